"""The complete model on Triton kernels, on a GPU or interpreted, against the reference backend."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, ModelArgs, Transformer, builtin_checkpoint
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.decode_graph import Decoder
from fastllama.draft import choose_guesser
from fastllama.kernels import fused as fused_backend
from fastllama.kernels.attention import scratch
from fastllama.kernels.batch import RaggedBatch
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_answers
from tests.support.fake_graph import RecordedGraph
from tests.support.tiers import parameters
from tests.support.tiny import tiny_llama

BACKENDS = ("reference", "fused")
FEW_SPLITS = 4  # of attention: in the interpreter, empty splits take as long as full ones
STORIES260K: dict[str, Any] = {
    "dim": 64,
    "n_layers": 5,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 512,
    "hidden_dim": 172,
    "rope_theta": 10000.0,
    "tied_output": True,
}


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "NUM_SPLITS", FEW_SPLITS)


def transformers(
    device: torch.device, dtype: torch.dtype, *, quantize: str | None = None, **fields: object
) -> list[Transformer]:
    """A model on each backend, of the same random weights, large enough that no two logits are close."""
    args = ModelArgs(**fields, max_batch_size=4, max_seq_len=64)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in args.shapes.items()
        if name != "output.weight"
    }
    models = []
    for backend in BACKENDS:
        options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend, "quantize": quantize}
        model = Transformer(args, **options, init_weights=False)
        model.load_tensors(weights.items())
        models.append(model)
    return models


@pytest.mark.slow
def test_builtin_model_gives_the_reference_tokens(device: torch.device) -> None:
    """Ragged prompts with echo and log-probabilities; one is too long for the matrix–vector kernels."""
    texts = ["Once upon a time", "The capital of France is the city of Paris, and the sun was warm on that day.", "A"]
    rows = []
    for backend in BACKENDS:
        llm = Llama.build(*builtin_checkpoint(), 64, 4, device=device, dtype="float32", backend=backend)
        prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in texts]
        rows.append(llm.generate(prompts, 4, temperature=0, logprobs=True, echo=True))
    assert_same_answers(rows[1], rows[0])


@pytest.mark.parametrize("n_rows", parameters({"one-row": 1, "three-rows": 3}, quick=("one-row",)))
def test_stories260k_shape_gives_the_reference_tokens(n_rows: int, device: torch.device) -> None:
    prompts = [[1, 250, 17, 300, 41], [9], list(range(100, 120))][:n_rows]
    outputs = []
    for model in transformers(device, torch.float32, **STORIES260K):
        outputs.append(Llama(model, tokenizer=_NoTokenizer()).generate(prompts, 8, temperature=0))  # type: ignore[arg-type]
    assert outputs[0] == outputs[1]


QUANTIZED = {**STORIES260K, "n_layers": 1, "hidden_dim": 192}  # int4's groups divide 64 and 192 columns
QUANTIZED_PROMPTS = {"one-row": [[1, 250, 17, 300, 41]], "three-rows": [[1, 250, 17], [9], list(range(100, 120))]}
FORMATS = {name: name for name in ("int8", "fp8", "int4", "int4-g32")}


@pytest.mark.parametrize("prompts", parameters(QUANTIZED_PROMPTS, quick=("one-row",)))
@pytest.mark.parametrize("quantize", parameters(FORMATS, quick=("int4",)))
def test_quantised_weights_give_the_reference_tokens(
    quantize: str, prompts: list[list[int]], device: torch.device
) -> None:
    """Steps of one and of three rows, and prompts of up to 20 tokens."""
    outputs = []
    models = transformers(device, torch.float32, quantize=quantize, **QUANTIZED)
    for model in models:
        llm = Llama(model, tokenizer=_NoTokenizer())  # type: ignore[arg-type]
        outputs.append(llm.generate(prompts, 3, temperature=0))
    assert outputs[0] == outputs[1]
    reference, fused = (model.state_dict() for model in models)
    assert all(torch.equal(fused[name], weight) for name, weight in reference.items())


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", parameters({"two-rows": 2, "three-rows": 3}, quick=("two-rows",)))
def test_replays_like_eager(n_rows: int, device: torch.device) -> None:
    """Captured steps give the eager tokens on uneven batches, with CUDA graphs or, on a CPU, the fake graph."""
    prompts = [[1, 250, 17, 300, 41], [9], [100, 101, 102]][:n_rows]
    _, model = transformers(device, torch.float32, **{**STORIES260K, "n_layers": 1})
    eager, replayed = (Llama(model, tokenizer=_NoTokenizer()) for _ in range(2))  # type: ignore[arg-type]
    eager.decoder = Decoder(model, graphs=False)
    replayed.decoder = Decoder(model, new_graph=None if device.type == "cuda" else RecordedGraph)
    for rows, temperature in ((prompts, 0.0), (prompts[::-1], 1.0), (prompts[1:2], 0.8)):
        assert replayed.generate(rows, 3, temperature, seed=3) == eager.generate(rows, 3, temperature, seed=3)


class _NoTokenizer:
    """The attributes that a call without text needs of its tokenizer."""

    stop_tokens: frozenset[int] = frozenset()
    special_tokens: dict[str, int] = {}  # noqa: RUF012


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_the_references(dtype: torch.dtype, device: torch.device) -> None:
    """Prefill, a second chunk and a decode step, within the tolerance of half precision's rounding."""
    reference, fused = transformers(device, dtype, **STORIES260K)
    tokens = torch.arange(3 * 20).view(3, 20).to(device) * 7 % 512
    for begin, end in ((0, 18), (18, 19), (19, 20)):
        expected, ours = (model.forward(tokens[:, begin:end], begin) for model in (reference, fused))
        assert_matches("logits", ours.to(dtype), expected)


@pytest.mark.slow
def test_seeded_draws_are_the_references(device: torch.device, tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_params(), random_weights(tiny_params(), seed=3))
    write_tokenizer(tmp_path)
    outputs = []
    for backend in BACKENDS:
        llm = Llama.build(
            str(tmp_path), str(tmp_path / "tokenizer.model"), 48, 4, device=device, dtype="float32", backend=backend
        )
        prompts = [[5, 250, 17], [9], [31, 32]]
        outputs.append([llm.generate(prompts, 5, temperature=t, top_p=p, seed=11) for t, p in ((0.8, 0.9), (1.5, 1.0))])
    assert outputs[0] == outputs[1]


def test_an_op_without_a_workspace_allocates_its_own(device: torch.device) -> None:
    reference, fused = transformers(device, torch.float32, **STORIES260K)
    batch = RaggedBatch.of([(0, 0, [5, 6, 7]), (2, 0, [8])], device)
    assert batch.workspace is None
    hidden = [model.hidden(batch) for model in (reference, fused)]
    assert_matches("logits", hidden[1], hidden[0])


def test_an_aborted_call_does_not_affect_the_next(device: torch.device) -> None:
    """Counters that an aborted launch left behind are zeroed before the next call."""
    outputs = []
    for model in transformers(device, torch.float32, **{**STORIES260K, "n_layers": 1}):
        if model.backend == "fused":
            model.workspace.attention.counters.fill_(3)
            model.workspace.sampling.counters.fill_(3)
        llm = Llama(model, tokenizer=_NoTokenizer())  # type: ignore[arg-type]
        outputs.append(llm.generate([[5, 6, 7] * 12], 2, temperature=1.0, seed=3))
    assert outputs[0] == outputs[1]
    assert not model.workspace.attention.counters.any() and not model.workspace.sampling.counters.any()


def test_a_model_made_in_inference_mode_generates(device: torch.device) -> None:
    with torch.inference_mode():
        fused = transformers(device, torch.float32, **{**STORIES260K, "n_layers": 1})[1]
    llm = Llama(fused, tokenizer=_NoTokenizer())  # type: ignore[arg-type]
    assert len(llm.generate([[5, 6, 7]], 1, temperature=0)[0][0]) == 1


def test_ops_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, so an op makes its tensors' GPU current."""
    entered: list[torch.device] = []

    def enter(device: torch.device) -> nullcontext[None]:
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    guarded = fused_backend._on_tensor_device(lambda tensor: "launched")
    for index, expected in ((1, [torch.device("cuda", 1)]), (0, [])):
        entered.clear()
        monkeypatch.setattr(Tensor, "device", torch.device("cuda", index))
        assert guarded(torch.zeros(1)) == "launched" and entered == expected


def test_state_dict_is_unchanged_by_packing(tmp_path: Path, device: torch.device) -> None:
    expected = tiny_llama(tmp_path).model
    fused = Transformer(expected.params, device=device, dtype=torch.float32, backend="fused", init_weights=False)
    fused.load_state_dict(expected.state_dict())
    for name, weight in expected.state_dict().items():
        assert torch.equal(fused.state_dict()[name].cpu(), weight)


def test_head_dims_beyond_the_tiles_are_refused(device: torch.device) -> None:
    args = ModelArgs(dim=516, n_layers=1, n_heads=2, head_dim=258, vocab_size=16, max_batch_size=1, max_seq_len=8)
    with pytest.raises(ValueError, match='even head dims up to 256, got 258: build with backend="reference"'):
        Transformer(args, device=device, backend="fused")
    Transformer(args, device=device, backend="reference")


GUESSES = {
    "one-row": ("draft", 2, 1),
    "two-rows": ("draft", 2, 2),
    "many-tokens": ("draft", 8, 2),  # 18 in a step
    "lookup": ("lookup", 3, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", parameters(GUESSES, quick=("lookup",)))
def test_steps_that_check_guesses_give_the_reference_tokens(case: tuple[str, int, int], device: torch.device) -> None:
    """By kernels of single tokens, of several and of more than 16, as a graph."""
    kind, n_guesses, n_rows = case
    prompts = [[1, 250, 17, 300, 41, 17, 300], [9, 8, 9, 8]][:n_rows]
    plain, model = transformers(device, torch.float32, **STORIES260K)
    draft = transformers(device, torch.float32, **STORIES260K)[1] if kind == "draft" else None
    llms = [Llama(one, tokenizer=_NoTokenizer()) for one in (plain, model)]  # type: ignore[arg-type]
    new_graph = None if device.type == "cuda" else RecordedGraph
    guesser = choose_guesser(kind, model, draft)
    llms[1].decoder = Decoder(model, new_graph=new_graph, guesser=guesser, n_guesses=n_guesses)
    expected, found = (llm.generate(prompts, 6, temperature=0, logprobs=True) for llm in llms)
    assert_same_answers(found, expected)
    stats = llms[1].speculation
    assert stats is not None and (kind == "lookup" or stats.accepted > stats.steps / 3)
