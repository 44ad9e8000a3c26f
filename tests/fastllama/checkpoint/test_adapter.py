"""LoRA adapters: merged slices against the formula in float64, and greedy tokens against weights merged beforehand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama
from fastllama.checkpoint import Checkpoint, open_checkpoint
from tests.support.adapters import Factors, factor_tensors, merged, random_factors, write_adapter
from tests.support.checkpoints import (
    Weights,
    random_weights,
    share,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.command_line import GREEDY, run, run_process

PARAMS = tiny_params()
TIED = tiny_params(tied_output=True)
WEIGHTS = random_weights(PARAMS, seed=11)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
EVERYTHING = (*LINEAR, "lm_head", "embed_tokens")
PROMPTS = [[5, 250, 17, 300, 41], [9], [101, 3, 77, 512]]


def factors_of(*targets: str, seed: int = 0, weights: Weights = WEIGHTS, **options: Any) -> Factors:
    return random_factors(PARAMS, weights, targets, seed, **options)


def assert_rounded_once(found: Tensor, exact: Tensor, name: str) -> None:
    """Assert that `found` is `exact` rounded to its dtype, but for float32's error of a few units in the last place."""
    unit = torch.finfo(found.dtype).eps * 2.0 ** (torch.frexp(exact)[1].double() - 1)
    assert ((found.double() - exact).abs() <= 0.5 * unit + 2e-6).all(), name


def assert_merged(checkpoint: Checkpoint, exact: Weights, dtype: torch.dtype = torch.float32) -> None:
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            received = dict(checkpoint.dense_tensors(rank, world_size, progress=False))
            assert list(received) == list(exact)
            for name, tensor in received.items():
                assert tensor.dtype == dtype
                assert_rounded_once(tensor, share(PARAMS, name, exact[name], rank, world_size), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["meta", "meta, two shards", "huggingface"])
def test_slices_are_those_of_the_merged_weights(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    factors = factors_of(*EVERYTHING)
    if layout == "huggingface":
        write_huggingface(tmp_path / "base", PARAMS, weights)
    else:
        write_meta(tmp_path / "base", PARAMS, weights, shards=2 if "two" in layout else 1)
    adapter = write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=6, target_modules=EVERYTHING)
    checkpoint = open_checkpoint(tmp_path / "base", [adapter])
    assert checkpoint.adapters == (adapter,)
    assert_merged(checkpoint, merged(PARAMS, weights, [(factors, 1.5)]), dtype)


def test_several_adapters_are_added_and_rounded_once(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    write_meta(tmp_path / "base", PARAMS, weights)
    adapters = [factors_of("q_proj", "o_proj", seed=seed) for seed in range(3)] + [factors_of("up_proj", seed=9)]
    folders = [write_adapter(tmp_path / str(number), one) for number, one in enumerate(adapters)]
    exact = merged(PARAMS, weights, [(one, 2.0) for one in adapters])
    assert_merged(open_checkpoint(tmp_path / "base", folders), exact, torch.bfloat16)


def test_large_weights_are_merged_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.checkpoint.adapter.CHUNK_BYTES", 7 * 64 * 4)  # 7 rows of 64: not whole heads
    factors = factors_of(*EVERYTHING)
    adapter = write_adapter(tmp_path / "adapter", factors)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_factors_may_have_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    factors = {module: (a.to(dtype), b.to(dtype)) for module, (a, b) in factors_of("k_proj").items()}
    adapter = write_adapter(tmp_path / "adapter", factors)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


def test_a_callers_autocast_does_not_change_the_merge(tmp_path: Path) -> None:
    factors = factors_of("gate_proj")
    adapter = write_adapter(tmp_path / "adapter", factors)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    with torch.autocast("cpu", torch.bfloat16):
        assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


@pytest.mark.parametrize(
    ("prefix", "adapter"),
    [("base_model.model.", "default"), ("", ""), ("base_model.", ""), ("base_model.model.model.", "a-name")],
)
def test_names_with_other_prefixes_and_an_adapters_name(tmp_path: Path, prefix: str, adapter: str) -> None:
    factors = factors_of("q_proj", "lm_head", "embed_tokens")
    folder = write_adapter(tmp_path / "adapter", factor_tensors(factors, prefix, adapter))
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [folder])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


def test_names_of_a_base_model_alone(tmp_path: Path) -> None:
    factors = factors_of("q_proj")
    tensors = {name.replace("model.model.", "model."): tensor for name, tensor in factor_tensors(factors).items()}
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    folder = write_adapter(tmp_path / "adapter", tensors)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [folder])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_single_modules(tmp_path: Path, rslora: bool) -> None:
    factors = factors_of("q_proj", "v_proj", ranks={"q_proj": 9, "v_proj": 4})
    patterns = {
        "rank_pattern": {"q_proj": 9, "roj": 3},  # "roj" is not the end of a name from a dot on
        "alpha_pattern": {r"layers\.1\.self_attn\.[qv]_proj": 5, "model.layers.0.self_attn.v_proj": 7.5, "q_proj": 3},
    }
    adapter = write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8, use_rslora=rslora, **patterns)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    root: Callable[[float], float] = math.sqrt if rslora else float
    scales = {
        "model.layers.0.self_attn.q_proj": 3 / root(9),
        "model.layers.0.self_attn.v_proj": 7.5 / root(4),
        "model.layers.1.self_attn.q_proj": 5 / root(9),
        "model.layers.1.self_attn.v_proj": 5 / root(4),
    }
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, scales)]))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
        {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": "all-linear", "exclude_modules": [*LINEAR[1:2], *LINEAR[3:]], "layers_to_transform": [1]},
    ],
)
def test_modules_that_are_no_targets_need_no_tensors(tmp_path: Path, fields: dict[str, Any]) -> None:
    factors = {module: pair for module, pair in factors_of("q_proj", "v_proj").items() if ".1." in module}
    adapter = write_adapter(tmp_path / "adapter", factors, **fields)
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids="+".join)
@pytest.mark.parametrize("layout", ["meta", "huggingface"])
def test_an_adapter_unties_a_tied_output(tmp_path: Path, layout: str, targets: tuple[str, ...]) -> None:
    weights = random_weights(TIED, seed=4)
    if layout == "meta":
        base = write_meta(tmp_path / "base", TIED, weights, tied_output=True)
    else:
        base = write_huggingface(tmp_path / "base", TIED, weights)
    factors = factors_of(*targets, weights=weights)
    checkpoint = open_checkpoint(base, [write_adapter(tmp_path / "adapter", factors)])
    assert open_checkpoint(base).params["tied_output"] and not checkpoint.params["tied_output"]
    assert checkpoint.n_parameters == open_checkpoint(base).n_parameters + weights["output.weight"].numel()
    assert_merged(checkpoint, merged(TIED, weights, [(factors, 2.0)]))


def test_a_tied_output_stays_tied_without_an_adapter_of_it(tmp_path: Path) -> None:
    weights = random_weights(TIED, seed=4)
    base = write_meta(tmp_path / "base", TIED, weights, tied_output=True)
    factors = factors_of("o_proj", weights=weights)
    checkpoint = open_checkpoint(base, [write_adapter(tmp_path / "adapter", factors)])
    assert checkpoint.params["tied_output"]
    assert_merged(checkpoint, merged(TIED, weights, [(factors, 2.0)]))


def test_copies_of_the_bases_embedding_and_output_are_accepted(tmp_path: Path) -> None:
    factors = factors_of("lm_head", "embed_tokens")
    copies = {
        "base_model.model.lm_head.base_layer.weight": WEIGHTS["output.weight"],
        "base_model.model.model.embed_tokens.weight": WEIGHTS["tok_embeddings.weight"],
    }
    adapter = write_adapter(tmp_path / "adapter", {**factor_tensors(factors), **copies})
    checkpoint = open_checkpoint(write_meta(tmp_path / "base", PARAMS, WEIGHTS), [adapter])
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


def test_an_adapter_beside_the_base_is_applied_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factors = factors_of("q_proj")
    write_adapter(write_huggingface(tmp_path, PARAMS, WEIGHTS), factors)
    checkpoint = open_checkpoint(tmp_path, [tmp_path])
    assert checkpoint.passed_over == () and caplog.messages == []
    assert_merged(checkpoint, merged(PARAMS, WEIGHTS, [(factors, 2.0)]))


def greedy(folder: Path, **options: Any) -> list[list[int]]:
    llm = Llama.build(str(folder), str(folder), 32, 3, device="cpu", **options)
    llm.tokenizer.stop_tokens = set()
    return llm.generate(PROMPTS, 16, temperature=0)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, two adapters "one" and "two", and "merged": the base with both merged beforehand."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [factors_of(*LINEAR), factors_of("lm_head", "q_proj", seed=1)]
    for name, factors in zip(("one", "two"), adapters, strict=True):
        write_adapter(folder / name, factors)
    exact = merged(PARAMS, WEIGHTS, [(factors, 2.0) for factors in adapters])
    write_meta(folder / "base", PARAMS, WEIGHTS)
    write_meta(folder / "merged", PARAMS, {name: weight.float() for name, weight in exact.items()})
    for name in ("base", "merged"):
        write_tokenizer(folder / name)
    return folder


def test_greedy_tokens_are_those_of_merged_weights(folders: Path) -> None:
    expected = greedy(folders / "merged")
    assert greedy(folders / "base", adapter=[folders / "one", str(folders / "two")]) == expected
    assert expected != greedy(folders / "base", adapter=str(folders / "one")) != greedy(folders / "base")
    assert greedy(folders / "base", adapter=[]) == greedy(folders / "base", adapter=None)


@pytest.mark.parametrize("nproc", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_commands_option_gives_the_merged_weights_text(folders: Path, nproc: str) -> None:
    adapters = [word for name in ("one", "two") for word in ("--adapter", str(folders / name))]
    expected = run("complete", "hello", *GREEDY, "--ckpt_dir", str(folders / "merged"))
    words = ("complete", "hello", *GREEDY, "--ckpt_dir", str(folders / "base"))
    assert expected.exit_code == 0 and expected.stdout != run(*words).stdout
    if nproc == "1":
        assert run(*words, *adapters).stdout == expected.stdout
    else:
        assert run_process(*words, *adapters, "--nproc", nproc).stdout == expected.stdout


def test_inspect_names_the_adapters(folders: Path) -> None:
    words = ("inspect", str(folders / "base"), "--adapter", str(folders / "two"))
    assert json.loads(run(*words, "--json").stdout)["adapters"] == [str(folders / "two")]
    assert f"adapters\n  merged  {folders / 'two'}\n" in run(*words).stdout
    assert "adapters\n" not in run("inspect", str(folders / "base")).stdout


@pytest.mark.parametrize("value", [3, [None], {"a": 1}, b"folder"])
def test_adapter_must_be_folders(folders: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^adapter must be a folder or a list of folders, got "):
        greedy(folders / "base", adapter=value)
