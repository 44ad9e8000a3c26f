"""Meta's checkpoints: any number of shards on any number of processes, read lazily and in order."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama.args import ModelArgs, ffn_width
from fastllama.checkpoint import Checkpoint, open_checkpoint
from fastllama.checkpoint.sharding import check_split
from tests.support.checkpoints import head_dim, random_weights, share, tiny_params, write_meta, write_tokenizer

PARAMS = tiny_params()
WEIGHTS = random_weights(PARAMS, seed=1)


def assert_slices(checkpoint: Checkpoint, world_size: int) -> None:
    """Every rank receives exactly its slice of WEIGHTS, bit for bit."""
    for rank in range(world_size):
        received = dict(checkpoint.dense_tensors(rank, world_size))
        assert received.keys() == WEIGHTS.keys()
        for name, tensor in received.items():
            expected = share(PARAMS, name, WEIGHTS[name], rank, world_size)
            assert torch.equal(tensor, expected), f"{name}, rank {rank} of {world_size}"


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama3", "llama2"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_any_shards_load_on_any_world_size(tmp_path: Path, shards: int, embedding_axis: int, world_size: int) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS, shards=shards, embedding_axis=embedding_axis)
    assert_slices(open_checkpoint(tmp_path), world_size)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_split_by_three(tmp_path: Path, shards: int, world_size: int) -> None:
    params = tiny_params(dim=48, n_heads=6, n_kv_heads=3, multiple_of=24, vocab_size=513)
    weights = random_weights(params)
    checkpoint = open_checkpoint(write_meta(tmp_path, params, weights, shards=shards))
    for rank in range(world_size):
        for name, tensor in checkpoint.dense_tensors(rank, world_size):
            assert torch.equal(tensor, share(params, name, weights[name], rank, world_size))


def test_tensors_come_in_the_order_of_a_forward_pass(tmp_path: Path) -> None:
    write_meta(tmp_path, PARAMS, dict(sorted(WEIGHTS.items())))
    layer = "attention_norm attention.wq attention.wk attention.wv attention.wo ffn_norm"
    parts = [*layer.split(), "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
    expected = [f"layers.{i}.{part}.weight" for i in range(2) for part in parts]
    received = [name for name, _ in open_checkpoint(tmp_path).dense_tensors()]
    assert received == ["tok_embeddings.weight", *expected, "norm.weight", "output.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tensors_keep_the_files_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS, shards=2, dtype=dtype))
    assert checkpoint.dtype == dtype
    for name, tensor in checkpoint.dense_tensors():
        assert tensor.dtype == dtype and tensor.device.type == "cpu"
        assert torch.equal(tensor, WEIGHTS[name].to(dtype))


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_of_float64_are_read_as_float32(tmp_path: Path, shards: int, tied: bool) -> None:
    params = tiny_params(tied_output=tied)
    weights = random_weights(params, dtype=torch.float64)
    checkpoint = open_checkpoint(write_meta(tmp_path, params, weights, shards))
    assert (checkpoint.dtype, checkpoint.params["tied_output"]) == (torch.float32, tied)
    for name, tensor in checkpoint.dense_tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def test_tensors_keep_wider_norms(tmp_path: Path) -> None:
    weights = {name: weight if "norm" in name else weight.bfloat16() for name, weight in WEIGHTS.items()}
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, weights, shards=2))
    assert checkpoint.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in checkpoint.dense_tensors()} == {
        n: w.dtype for n, w in weights.items()
    }


def test_tensors_may_be_read_again_and_interleaved(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS, shards=2))
    first, second = checkpoint.dense_tensors(), checkpoint.dense_tensors(1, 2)
    next(first)
    next(second)
    assert next(first)[0] == next(second)[0]
    del first
    assert len(list(checkpoint.dense_tensors())) == len(WEIGHTS)


def test_tensors_of_one_shard_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS, shards=2))
    once, again = dict(checkpoint.dense_tensors(1, 4)), dict(checkpoint.dense_tensors(1, 4))
    copied = [name for name in once if once[name].data_ptr() != again[name].data_ptr()]
    assert copied == []


def test_open_resolves_every_size(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS, shards=2))
    assert checkpoint.format == "meta"
    assert checkpoint.path == tmp_path
    assert checkpoint.params == {
        **PARAMS,
        "ffn_dim_multiplier": None,
        "use_scaled_rope": False,
        "head_dim": 8,
        "hidden_dim": 176,
        "tied_output": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert checkpoint.stop_token_ids == ()
    assert checkpoint.n_parameters == sum(weight.numel() for weight in WEIGHTS.values())
    paths = [tmp_path / "consolidated.00.pth", tmp_path / "consolidated.01.pth"]
    assert checkpoint.files == [(path, path.stat().st_size) for path in paths]


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stated", [-1, None])
def test_open_reads_the_vocabulary_size_from_the_embedding(
    tmp_path: Path, stated: int | None, shards: int, embedding_axis: int
) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS, shards=shards, embedding_axis=embedding_axis, vocab_size=stated)
    assert open_checkpoint(tmp_path).params["vocab_size"] == PARAMS["vocab_size"]


def test_open_uses_n_heads_if_n_kv_heads_is_absent(tmp_path: Path) -> None:
    params = tiny_params(n_kv_heads=None)
    write_meta(tmp_path, params, random_weights(params), shards=2)
    assert open_checkpoint(tmp_path).params["n_kv_heads"] == 8


def test_open_warns_if_theta_is_metas_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS)
    open_checkpoint(tmp_path)
    assert not caplog.records
    write_meta(tmp_path, PARAMS, WEIGHTS, rope_theta=None, norm_eps=None)
    params = open_checkpoint(tmp_path).params
    assert (params["rope_theta"], params["norm_eps"]) == (500000.0, 1e-5)
    assert "params.json has no rope_theta" in caplog.text


def test_open_returns_scaled_rope_only_as_stated(tmp_path: Path) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS, use_scaled_rope=True)
    params = open_checkpoint(tmp_path).params
    assert params["use_scaled_rope"] and not any(key.startswith("rope_") for key in params.keys() - {"rope_theta"})
    stated: dict[str, Any] = {
        "rope_scaling_factor": 32,
        "rope_high_freq_factor": 2.0,
        "rope_original_max_seq_len": 4096,
    }
    write_meta(tmp_path, PARAMS, WEIGHTS, use_scaled_rope=True, **stated)
    assert stated.items() <= open_checkpoint(tmp_path).params.items()


def test_open_reads_rope_factors(tmp_path: Path) -> None:
    n_frequencies = head_dim(PARAMS) // 2
    factors = [1.0 + number for number in range(n_frequencies)]
    write_meta(tmp_path, PARAMS, WEIGHTS, use_scaled_rope=False, rope_type="factors", rope_factors=factors)
    args = ModelArgs(**open_checkpoint(tmp_path).params)
    assert (args.rope_type, args.rope_factors) == ("factors", tuple(factors))
    for wrong in (factors[1:], "1", [None] * n_frequencies, [10**400] * n_frequencies):
        write_meta(tmp_path, PARAMS, WEIGHTS, use_scaled_rope=False, rope_type="factors", rope_factors=wrong)
        with pytest.raises(ValueError, match=r"params\.json: rope_factors must be "):
            open_checkpoint(tmp_path)


def test_open_reads_stated_head_and_hidden_dims(tmp_path: Path) -> None:
    params = tiny_params(head_dim=16, hidden_dim=72)
    weights = random_weights(params)
    checkpoint = open_checkpoint(write_meta(tmp_path, params, weights, shards=2))
    assert (checkpoint.params["head_dim"], checkpoint.params["hidden_dim"]) == (16, 72)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.dense_tensors())


def test_open_ignores_limits_of_a_run_and_rope_freqs(tmp_path: Path) -> None:
    write_meta(tmp_path, PARAMS, WEIGHTS, max_seq_len=2048, max_batch_size=32, quantization_args=None)
    path = tmp_path / "consolidated.00.pth"
    torch.save({**torch.load(path), "rope.freqs": torch.ones(4, dtype=torch.complex64)}, path)
    checkpoint = open_checkpoint(tmp_path)
    assert "max_seq_len" not in checkpoint.params and "max_batch_size" not in checkpoint.params
    assert dict(checkpoint.dense_tensors()).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("shards", [1, 2])
def test_open_detects_a_tied_output_by_shared_storage(tmp_path: Path, shards: int) -> None:
    params = tiny_params(tied_output=True)
    weights = random_weights(params)
    checkpoint = open_checkpoint(write_meta(tmp_path, params, weights, shards=shards))
    assert checkpoint.params["tied_output"]
    assert checkpoint.n_parameters == sum(w.numel() for name, w in weights.items() if name != "output.weight")
    for rank in range(4):
        received = dict(checkpoint.dense_tensors(rank, 4))
        expected = share(params, "output.weight", weights["output.weight"], rank, 4)
        assert torch.equal(received["output.weight"], expected)
        assert torch.equal(received["tok_embeddings.weight"], expected)


def test_open_accepts_a_stated_tied_output_without_the_tensor(tmp_path: Path) -> None:
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "output.weight"}
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, weights, shards=2, tied_output=True))
    received = dict(checkpoint.dense_tensors())
    assert torch.equal(received["output.weight"], WEIGHTS["tok_embeddings.weight"])


@pytest.mark.parametrize("place", [".", "original", "original/mp8", "original/mp16"])
def test_open_finds_meta_files(tmp_path: Path, place: str) -> None:
    write_meta(tmp_path / place, PARAMS, WEIGHTS)
    write_tokenizer(tmp_path / place)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(str(tmp_path)).path == tmp_path / place


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "expected"),
    [
        (4096, 1.3, 1024, 14336),
        (8192, 1.3, 4096, 28672),
        (16384, 1.2, 4096, 53248),
        (2048, 1.5, 256, 8192),
        (3072, 1.0, 256, 8192),
        (4096, 1.0, 256, 11008),
    ],
)
def test_hidden_dim_of_published_models(dim: int, multiplier: float, multiple_of: int, expected: int) -> None:
    assert ffn_width(dim, multiplier, multiple_of) == expected


def test_check_split_lists_possible_world_sizes() -> None:
    dims = {"n_heads": 12, "n_kv_heads": 4, "head_dim": 8, "hidden_dim": 96, "vocab_size": 480}
    for world_size in (1, 2, 4, 12):
        check_split(dims, world_size - 1, world_size)
    with pytest.raises(ValueError, match=r"world_size=6 .*n_kv_heads=4 .* of 6; use one of 1, 2, 4, 12 processes"):
        check_split(dims, 0, 6)
    with pytest.raises(ValueError, match=r"world_size=5 .*n_heads=12 does not divide by 5; hidden_dim=96"):
        check_split(dims, 0, 5)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 1), (1, 1), (2, 2), (0, 0), (0, -1)])
def test_tensors_rejects_a_rank_outside_the_world_at_the_call(tmp_path: Path, rank: int, world_size: int) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS))
    with pytest.raises(ValueError, match=rf"rank={rank}, world_size={world_size}"):
        checkpoint.dense_tensors(rank, world_size)
    assert_slices(checkpoint, 1)


def test_tensors_shows_progress_in_bytes_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(write_meta(tmp_path, PARAMS, WEIGHTS))
    for progress in (None, False):
        list(checkpoint.dense_tensors(progress=progress))
        assert capsys.readouterr() == ("", "")  # neither is a terminal here
    list(checkpoint.dense_tensors(progress=True))
    shown = capsys.readouterr()
    total = sum(weight.nbytes for weight in WEIGHTS.values())
    assert shown.out == "" and "100%" in shown.err and f"{total / 1024:.0f}k" in shown.err
