"""Decoder: captured decode steps and steps enqueued ahead, on a CPU with a fake CUDA graph (`RecordedGraph`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, ModelArgs, Transformer, step_graphs
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import INACTIVE, DecodeState
from fastllama.kernels.graph import Graph
from fastllama.output_copies import OutputCopies
from fastllama.step_graphs import graph_size
from tests.support.comparisons import assert_same_answers
from tests.support.fake_graph import RecordedGraph
from tests.support.tiny import MAX_BATCH_SIZE, tiny_llama

Rows = list[list[int]]

MAX_GEN_LEN = 12
PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]
# Calls that differ in every value that a captured step must read from the device, not from Python.
CALLS: list[dict[str, Any]] = [
    {"prompts": PROMPTS, "temperature": 0.0, "stops": set()},
    {"prompts": PROMPTS[2:] + PROMPTS[:2], "temperature": 1.0, "top_p": 0.8, "seed": [7, 8, 9, 10], "stops": set()},
    {"prompts": PROMPTS[:3], "temperature": 2.0, "top_p": 1.0, "seed": 5, "stops": set(range(0, 576, 5))},
]


class GraphFactory:
    """Makes RecordedGraphs and keeps a list of them."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def __call__(self) -> Graph:
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[Llama]:
    llm = tiny_llama(tmp_path, backend="reference")  # whose ops of torch the fake graph records
    yield llm
    state = llm.decoder._state
    assert bool((state.positions == INACTIVE).all()), "a row is still active after its call"


def answers(llm: Llama, *, prompts: Rows, stops: set[int], **how: Any) -> tuple[Rows, list[list[float]]]:
    llm.tokenizer.stop_tokens = stops
    tokens, scores = llm.generate(prompts, MAX_GEN_LEN, logprobs=True, **how)
    assert scores is not None
    return tokens, scores


def assert_answers(llm: Llama, expected: Sequence[tuple[Rows, list[list[float]]]]) -> None:
    """Assert that all CALLS return these tokens and log-probabilities."""
    for call, wanted in zip(CALLS, expected, strict=True):
        assert_same_answers(answers(llm, **call), wanted)


def streamed(llm: Llama, *, prompts: Rows, stops: set[int], **how: Any) -> Rows:
    llm.tokenizer.stop_tokens = stops
    tokens: Rows = [[] for _ in prompts]
    for increment in llm.stream(prompts, MAX_GEN_LEN, **how):
        tokens[increment.row] += increment.tokens
    return tokens


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows by one entry for every step that runs."""
    steps: list[None] = []
    step = step_graphs.step

    def counted(*args: Any, **options: Any) -> None:
        steps.append(None)
        step(*args, **options)

    monkeypatch.setattr(step_graphs, "step", counted)
    return steps


@pytest.mark.parametrize("unroll", [1, 3])
def test_replays_like_eager_on_uneven_batches(llm: Llama, unroll: int) -> None:
    """One recording serves all calls: a value read by Python would keep its value of the first call."""
    expected = [answers(llm, **call) for call in CALLS]
    factory = GraphFactory()
    llm.decoder = Decoder(llm.model, new_graph=factory, unroll=unroll)
    for _ in range(2):
        assert_answers(llm, expected)
    assert len(factory.graphs) == 1, "calls of three and four rows share the graph of four"


@pytest.mark.parametrize(("ahead", "unroll"), [(2, 1), (2, 2), (1, 3)])
def test_steps_enqueued_ahead_never_reach_the_output(
    llm: Llama, ahead: int, unroll: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answers(llm, **call) for call in CALLS]
    monkeypatch.setattr(Decoder, "replays_ahead", ahead)
    launched = count_steps(monkeypatch)
    for new_graph in (None, RecordedGraph):
        llm.decoder = Decoder(llm.model, new_graph=new_graph, unroll=unroll)
        assert_answers(llm, expected)
        assert [streamed(llm, **call) for call in CALLS] == [tokens for tokens, _ in expected]
    # A row that ends at its first token: only the steps enqueued ahead are wasted.
    llm.decoder = Decoder(llm.model, unroll=unroll)
    launched.clear()
    assert answers(llm, prompts=[[9]], stops=set(range(576)), temperature=0.0)[0] == [[]]
    assert len(launched) == ahead * unroll


def test_no_step_is_enqueued_beyond_the_last_budget(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_steps(monkeypatch)
    monkeypatch.setattr(Decoder, "replays_ahead", 2)
    llm.tokenizer.stop_tokens = set()
    assert [len(row) for row in llm.generate(PROMPTS, 6, temperature=0)[0]] == [6, 6, 6, 6]
    assert len(launched) == 5, "the first token comes from the prefill"


def test_a_stream_closed_early_leaves_nothing_behind(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "replays_ahead", 2)
    for new_graph in (None, RecordedGraph):
        llm.decoder = Decoder(llm.model, new_graph=new_graph)
        expected = answers(llm, **CALLS[1])
        stream = llm.stream(PROMPTS, 20, seed=3)
        next(stream)
        stream.close()
        assert_same_answers(answers(llm, **CALLS[1]), expected)


def test_graphs_are_captured_once_per_batch_size_and_again_for_other_weights(llm: Llama) -> None:
    factory = GraphFactory()
    llm.decoder = Decoder(llm.model, new_graph=factory)
    llm.decoder.capture_graphs([1, 4])
    assert len(factory.graphs) == 2
    for rows in (1, 2, 3, 4, 1):
        answers(llm, prompts=PROMPTS[:rows], stops=set(), temperature=0.0)
    assert len(factory.graphs) == 3, "only two rows had no graph; three rows use the graph of four"
    before = answers(llm, **CALLS[0])
    llm.model.load_state_dict({name: -weight for name, weight in llm.model.state_dict().items()})
    after = answers(llm, **CALLS[0])
    assert len(factory.graphs) == 4 and after[0] != before[0]
    llm.decoder = Decoder(llm.model)
    assert_same_answers(answers(llm, **CALLS[0]), after)
    llm.model.to(torch.float64).to(torch.float32)
    assert_same_answers(answers(llm, **CALLS[0]), after)


def test_a_load_that_fails_leaves_no_graph_of_replaced_weights(llm: Llama) -> None:
    factory = GraphFactory()
    llm.decoder = Decoder(llm.model, new_graph=factory)
    answers(llm, **CALLS[0])
    made, weights = len(factory.graphs), llm.model.state_dict()
    del weights["norm.weight"]
    with pytest.raises(ValueError, match="1 weights are missing"):
        llm.model.load_tensors((name, -weight) for name, weight in weights.items())
    after = answers(llm, **CALLS[0])
    assert len(factory.graphs) == made + 1
    llm.decoder = Decoder(llm.model)
    assert_same_answers(answers(llm, **CALLS[0]), after)


def test_capturing_changes_nothing_that_a_call_reads(llm: Llama) -> None:
    llm.decoder = Decoder(llm.model, new_graph=RecordedGraph)
    llm.generate(PROMPTS, 2, temperature=0)
    kept = llm.model.cache.k[:, :-1].clone()  # an inactive row writes to the page that belongs to no row
    state = llm.decoder._state
    outputs = state.out_tokens.clone()
    llm.decoder.capture_graphs([1, 2, 4])
    assert torch.equal(llm.model.cache.k[:, :-1], kept)
    assert torch.equal(state.out_tokens, outputs)


def test_the_fake_graph_detects_a_step_that_reads_values_on_the_host(llm: Llama) -> None:
    """A step that reads a value on the host during replay is refused; one that keeps a value gives other tokens."""
    expected, _ = answers(llm, **CALLS[0])
    ops = llm.model.ops

    def reading(logits: Tensor, state: DecodeState, workspace: object) -> None:
        state.positions.max().item()

    def keeping(logits: Tensor, state: DecodeState, workspace: object) -> None:
        ops.sample_and_advance(logits, state, workspace)
        state.tokens.fill_(state.tokens.tolist()[0])

    llm.decoder = Decoder(llm.model, new_graph=RecordedGraph)
    llm.model.ops = SimpleNamespace(**{**vars(ops), "sample_and_advance": reading})  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="aten::item waits for the device inside a step"):
        llm.generate(PROMPTS, 3, temperature=0)
    llm.model.ops = SimpleNamespace(**{**vars(ops), "sample_and_advance": keeping})  # type: ignore[assignment]
    assert answers(llm, **CALLS[0])[0] != expected


def test_each_row_ends_at_its_own_budget(llm: Llama) -> None:
    """A row of the decoder writes nothing after its last position."""
    decoder = llm.decoder
    sampling = SamplingTensors.of(0.0, 1.0, [(0, row, 0) for row in range(3)], torch.device("cpu"))
    with torch.inference_mode(), llm.model.exclusively():
        decoder.start([5, 6, 7], [0, 0, 0], [3, 1, 0], [], sampling)
        for _ in range(4):
            decoder.enqueue_steps()
            decoder.receive()
            assert decoder._state.out_tokens.shape[0] >= 4
    written = decoder._state.out_tokens[:4, :3] != 0
    assert written.T.tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4]


@pytest.mark.parametrize(
    ("n_rows", "most", "size"), [(1, 1, 1), (1, 32, 1), (3, 32, 4), (3, 3, 3), (9, 12, 12), (17, 64, 32), (33, 40, 40)]
)
def test_a_batch_uses_the_graph_of_the_next_size(n_rows: int, most: int, size: int) -> None:
    assert graph_size(n_rows, most) == size


def test_output_copies_are_received_in_order_and_never_overwritten() -> None:
    state = DecodeState.of(2, 4, 16, torch.device("cpu"))
    state.out_tokens.copy_(torch.arange(8).view(4, 2))
    copies = OutputCopies(2, torch.device("cpu"))
    copies.enqueue(state, 1)
    copies.enqueue(state, 2)
    state.out_tokens.zero_()
    with pytest.raises(RuntimeError, match="all 2 buffers are in flight: receive one first"):
        copies.enqueue(state, 2)
    assert copies.receive().tokens == [[0], [2], [4], [6]]
    copies.enqueue(state, 2, n_steps=5)
    assert copies.queued_steps == 6
    assert copies.receive().first_step == 1
    assert [step.tokens for step in copies.receive().steps()] == [[0, 0]] * 5
    state.out_tokens.copy_(torch.arange(8).view(4, 2))
    copies.enqueue(state, 2, n_steps=3)
    assert [step.tokens for step in copies.receive().steps()] == [[6, 7], [0, 1], [2, 3]]
    copies.clear()
    assert copies.queued == 0


def test_wrong_decoders_are_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="unroll must be at least 1 step, got 0"):
        Decoder(llm.model, unroll=0)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, and the model is on 'cpu': leave graphs out"):
        Decoder(llm.model, graphs=True)
    llm.decoder.capture_graphs([1])


def test_graphs_false_captures_nothing(llm: Llama) -> None:
    factory = GraphFactory()
    llm.decoder = Decoder(llm.model, graphs=False, new_graph=factory)
    answers(llm, **CALLS[0])
    assert not factory.graphs


@pytest.mark.parametrize("sizes", [[0], [5], ["x"], 3, "1"])
def test_batch_sizes_out_of_range_are_refused(sizes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph_batch_sizes must be a"):
        Llama.build(str(tmp_path), str(tmp_path), 8, 4, graph_batch_sizes=sizes)


def test_build_captures_the_requested_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captured: list[list[int]] = []
    monkeypatch.setattr(Decoder, "capture_graphs", lambda self, sizes: captured.append(list(sizes)))
    tiny_llama(tmp_path)
    assert captured == [[1, MAX_BATCH_SIZE]]
    args = (str(tmp_path), str(tmp_path / "tokenizer.model"), 16, 4)
    Llama.build(*args, device="cpu", graph_batch_sizes=[2, 3])
    Llama.build(*args, device="cpu", graph_batch_sizes=())
    assert captured[1:] == [[2, 3], []]


def test_moving_a_model_changes_its_revision() -> None:
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32, max_batch_size=2, max_seq_len=8)
    model = Transformer(args)
    revision = model.revision
    model.to(torch.float64)
    assert model.revision > revision
