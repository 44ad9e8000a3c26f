"""The complete model on the native backend, against the reference backend."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama, ModelArgs, Transformer, builtin_checkpoint
from fastllama.benchmarks.tolerances import assert_matches
from fastllama.decode_graph import Decoder
from fastllama.kernels.native import library
from fastllama.kernels.native.graph import NativeGraph
from fastllama.step_graphs import PLAIN
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_answers

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason="the native kernels were not built")

PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]
CALLS: list[dict[str, Any]] = [
    {"prompt_tokens": PROMPTS, "temperature": 0.0},
    {"prompt_tokens": PROMPTS[2:] + PROMPTS[:2], "temperature": 1.0, "top_p": 0.8, "seed": [7, 8, 9, 10]},
    {"prompt_tokens": PROMPTS[:3], "temperature": 2.0, "top_p": 1.0, "seed": 5},
    {"prompt_tokens": PROMPTS[1:2], "temperature": 0.0},
]


def llama(folder: Path, backend: str, **how: Any) -> Llama:
    """A tiny Llama, or with max_seq_len and max_batch_size of `how`."""
    if not (folder / "params.json").exists():
        write_meta(folder, tiny_params(), random_weights(tiny_params(), seed=7))
        write_tokenizer(folder)
    sizes = {"max_seq_len": 64, "max_batch_size": 4, "seed": 1, "dtype": "float32", **how}
    llm = Llama.build(str(folder), str(folder / "tokenizer.model"), device="cpu", backend=backend, **sizes)
    llm.tokenizer.stop_tokens = set()
    return llm


@pytest.fixture(params=[1, 3], ids=lambda count: f"threads{count}")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_generates_the_reference_tokens(tmp_path: Path) -> None:
    """Greedy and drawn tokens of ragged rows, which start and end at different steps."""
    reference, native = (llama(tmp_path, backend) for backend in ("reference", "native"))
    for call in CALLS:
        expected = reference.generate(max_gen_len=12, logprobs=True, echo=True, **call)
        assert_same_answers(native.generate(max_gen_len=12, logprobs=True, echo=True, **call), expected)
        for llm in (reference, native):
            llm.tokenizer.stop_tokens = set(expected[0][0][-4:-2])


@pytest.mark.parametrize("unroll", [1, 3])
def test_replays_like_eager(unroll: int, tmp_path: Path) -> None:
    llm = llama(tmp_path, "native")
    llm.decoder = Decoder(llm.model, graphs=False)
    expected = [llm.generate(max_gen_len=12, logprobs=True, **call) for call in CALLS]
    llm.decoder = Decoder(llm.model, unroll=unroll)
    for _ in range(2):
        for call, wanted in zip(CALLS, expected, strict=True):
            assert_same_answers(llm.generate(max_gen_len=12, logprobs=True, **call), wanted)
    assert llm.decoder.graphs.captured_sizes == [1, 4]
    assert isinstance(llm.decoder.graphs.captured[4, PLAIN, 0, False], NativeGraph)


def test_more_rows_than_the_kernels_take_alone(tmp_path: Path) -> None:
    """70 rows: eager steps use the library's matrix product, captured ones the kernels."""
    prompts = [[3 + row, 40 + row % 7] for row in range(70)]
    outputs = []
    for backend, graphs in (("reference", False), ("native", False), ("native", None)):
        llm = llama(tmp_path, backend, max_batch_size=70)
        llm.decoder = Decoder(llm.model, graphs=graphs)
        outputs.append(llm.generate(prompts, 6, temperature=0, logprobs=True))
    for ours in outputs[1:]:
        assert_same_answers(ours, outputs[0])


def test_long_rows_are_split(tmp_path: Path) -> None:
    """Rows beyond one split of attention and beyond two, beside a short one."""
    prompts = [[1 + i * 7 % 500 for i in range(length)] for length in (1100, 510, 3)]
    outputs = [
        llama(tmp_path, backend, max_seq_len=1300).generate(prompts, 8, temperature=0, logprobs=True)
        for backend in ("reference", "native")
    ]
    assert_same_answers(outputs[1], outputs[0])


def test_builtin_model_gives_the_reference_tokens() -> None:
    outputs = []
    for backend in ("reference", "native"):
        llm = Llama.build(*builtin_checkpoint(), 64, 4, device="cpu", dtype="float32", backend=backend)
        prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in ("Once upon a time", "A")]
        outputs.append(llm.generate(prompts, 16, temperature=0, logprobs=True))
    assert_same_answers(outputs[1], outputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_the_references(dtype: torch.dtype) -> None:
    """Prefill, a second chunk and a decode step, within the tolerance of half precision's rounding."""
    args = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=512, hidden_dim=172, max_seq_len=64)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / shape[-1] ** 0.5
        for name, shape in args.shapes.items()
    }
    models = []
    for backend in ("reference", "native"):
        models.append(Transformer(args, device="cpu", dtype=dtype, backend=backend, init_weights=False))
        models[-1].load_tensors(weights.items())
    tokens = torch.arange(3 * 20).view(3, 20) * 7 % 512
    for begin, end in ((0, 18), (18, 19), (19, 20)):
        expected, ours = (model.forward(tokens[:, begin:end], begin) for model in models)
        assert_matches("logits", ours.to(dtype), expected)


def test_two_models_run_on_two_threads(tmp_path: Path) -> None:
    models = [llama(tmp_path, "native", seed=seed) for seed in (1, 2)]
    expected = [llm.generate(PROMPTS, 12, temperature=1.0, seed=3) for llm in models]
    outputs: dict[int, list[Any]] = {0: [], 1: []}

    def repeat(index: int) -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            outputs[index].append(models[index].generate(PROMPTS, 12, temperature=1.0, seed=3))

    running = [threading.Thread(target=repeat, args=(index,), daemon=True) for index in (0, 1)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert [outputs[index] for index in (0, 1)] == [[wanted] * 5 for wanted in expected]


def test_loading_other_weights_captures_again(tmp_path: Path) -> None:
    native, reference = llama(tmp_path, "native"), llama(tmp_path, "reference")
    before = native.generate(PROMPTS, 6, temperature=0)
    for llm in (native, reference):
        llm.model.load_state_dict({name: -weight for name, weight in llm.model.state_dict().items()})
    after = native.generate(PROMPTS, 6, temperature=0)
    assert after != before and after == reference.generate(PROMPTS, 6, temperature=0)
