"""The decode step under capture, and the loop that queues ahead of what it has read, on a CPU with a graph's double."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import Llama, ModelArgs, Transformer, decode_graph
from fastllama.cuda_graph import Graph
from fastllama.decode_graph import Decoder, graph_size
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import INACTIVE, DecodeState
from fastllama.output_copies import OutputCopies
from tests.support.comparisons import assert_same_answers
from tests.support.fake_graph import Tape
from tests.support.tiny import MAX_BATCH_SIZE, MAX_SEQ_LEN, tiny_llama

Rows = list[list[int]]

MAX_GEN_LEN = 12
PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]
# Calls that differ in everything that a step must not take from Python.
CALLS: list[dict[str, Any]] = [
    {"prompts": PROMPTS, "temperature": 0.0, "stops": set()},
    {"prompts": PROMPTS[2:] + PROMPTS[:2], "temperature": 1.0, "top_p": 0.8, "seed": [7, 8, 9, 10], "stops": set()},
    {"prompts": PROMPTS[:3], "temperature": 2.0, "top_p": 1.0, "seed": 5, "stops": set(range(0, 576, 5))},
]


class Recorder:
    """Makes tapes, and keeps them."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self) -> Graph:
        self.tapes.append(Tape())
        return self.tapes[-1]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[Llama]:
    llm = tiny_llama(tmp_path)
    yield llm
    state = llm.decoder._state
    assert bool((state.positions == INACTIVE).all()), "a row is still standing after its call"


def answers(llm: Llama, *, prompts: Rows, stops: set[int], **how: Any) -> tuple[Rows, list[list[float]]]:
    llm.tokenizer.stop_tokens = stops
    tokens, scores = llm.generate(prompts, MAX_GEN_LEN, logprobs=True, **how)
    assert scores is not None
    return tokens, scores


def assert_answers(llm: Llama, expected: Sequence[tuple[Rows, list[list[float]]]]) -> None:
    """All calls are answered so."""
    for call, wanted in zip(CALLS, expected, strict=True):
        assert_same_answers(answers(llm, **call), wanted)


def streamed(llm: Llama, *, prompts: Rows, stops: set[int], **how: Any) -> Rows:
    llm.tokenizer.stop_tokens = stops
    tokens: Rows = [[] for _ in prompts]
    for increment in llm.stream(prompts, MAX_GEN_LEN, **how):
        tokens[increment.row] += increment.tokens
    return tokens


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that gets an entry for every step that runs."""
    steps: list[None] = []
    step = decode_graph.step

    def counted(*args: Any) -> None:
        steps.append(None)
        step(*args)

    monkeypatch.setattr(decode_graph, "step", counted)
    return steps


@pytest.mark.parametrize("unroll", [1, 3])
def test_replays_like_eager_on_uneven_batches(llm: Llama, unroll: int) -> None:
    """Thrice with one recording of each batch size: whatever Python had given to a step would be the first call's."""
    expected = [answers(llm, **call) for call in CALLS]
    recorder = Recorder()
    llm.decoder = Decoder(llm.model, new_graph=recorder, unroll=unroll)
    for _ in range(2):
        assert_answers(llm, expected)
    assert len(recorder.tapes) == 1, "calls of three and four rows share the graph of four"


@pytest.mark.parametrize(("ahead", "unroll"), [(2, 1), (2, 2), (1, 3)])
def test_what_is_queued_ahead_never_reaches_the_output(
    llm: Llama, ahead: int, unroll: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answers(llm, **call) for call in CALLS]
    monkeypatch.setattr(Decoder, "replays_ahead", ahead)
    launched = counted_steps(monkeypatch)
    for new_graph in (None, Tape):
        llm.decoder = Decoder(llm.model, new_graph=new_graph, unroll=unroll)
        assert_answers(llm, expected)
        assert [streamed(llm, **call) for call in CALLS] == [tokens for tokens, _ in expected]
    # A row whose first token ends it: what was queued ahead ran in vain, and nothing more was.
    llm.decoder = Decoder(llm.model, unroll=unroll)
    launched.clear()
    assert answers(llm, prompts=[[9]], stops=set(range(576)), temperature=0.0)[0] == [[]]
    assert len(launched) == ahead * unroll


def test_no_step_is_queued_beyond_the_last_budget(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = counted_steps(monkeypatch)
    monkeypatch.setattr(Decoder, "replays_ahead", 2)
    llm.tokenizer.stop_tokens = set()
    assert [len(row) for row in llm.generate(PROMPTS, 6, temperature=0)[0]] == [6, 6, 6, 6]
    assert len(launched) == 5, "the first token comes from the prefill"


def test_a_stream_closed_early_leaves_nothing_behind(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "replays_ahead", 2)
    for new_graph in (None, Tape):
        llm.decoder = Decoder(llm.model, new_graph=new_graph)
        expected = answers(llm, **CALLS[1])
        stream = llm.stream(PROMPTS, 20, seed=3)
        next(stream)
        stream.close()
        assert_same_answers(answers(llm, **CALLS[1]), expected)


def test_graphs_are_made_once_for_each_batch_size_and_anew_for_other_weights(llm: Llama) -> None:
    recorder = Recorder()
    llm.decoder = Decoder(llm.model, new_graph=recorder)
    llm.decoder.capture_graphs([1, 4])
    assert len(recorder.tapes) == 2
    for rows in (1, 2, 3, 4, 1):
        answers(llm, prompts=PROMPTS[:rows], stops=set(), temperature=0.0)
    assert len(recorder.tapes) == 3, "two rows had no graph yet; three take the one of four"
    before = answers(llm, **CALLS[0])
    llm.model.load_state_dict({name: -weight for name, weight in llm.model.state_dict().items()})
    after = answers(llm, **CALLS[0])
    assert len(recorder.tapes) == 4 and after[0] != before[0]
    llm.decoder = Decoder(llm.model)
    assert_same_answers(answers(llm, **CALLS[0]), after)
    llm.model.to(torch.float64).to(torch.float32)
    assert_same_answers(answers(llm, **CALLS[0]), after)


def test_a_load_that_breaks_off_leaves_no_graph_of_replaced_weights(llm: Llama) -> None:
    recorder = Recorder()
    llm.decoder = Decoder(llm.model, new_graph=recorder)
    answers(llm, **CALLS[0])
    made, weights = len(recorder.tapes), llm.model.state_dict()
    del weights["norm.weight"]
    with pytest.raises(ValueError, match="1 weights are missing"):
        llm.model.load_tensors((name, -weight) for name, weight in weights.items())
    after = answers(llm, **CALLS[0])
    assert len(recorder.tapes) == made + 1
    llm.decoder = Decoder(llm.model)
    assert_same_answers(answers(llm, **CALLS[0]), after)


def test_warming_up_changes_nothing_that_a_call_reads(llm: Llama) -> None:
    llm.decoder = Decoder(llm.model, new_graph=Tape)
    llm.generate(PROMPTS, 2, temperature=0)
    kept = llm.model.cache.k[:, :, :, : MAX_SEQ_LEN - 1].clone()  # a row at no position lands in its last place
    state = llm.decoder._state
    outputs = state.out_tokens.clone()
    llm.decoder.capture_graphs([1, 2, 4])
    assert torch.equal(llm.model.cache.k[:, :, :, : MAX_SEQ_LEN - 1], kept)
    assert torch.equal(state.out_tokens, outputs)


def test_a_step_that_waits_or_bakes_is_found_out(llm: Llama) -> None:
    """The double can fail: a step that reads a number on the host is refused, one that keeps it gives other tokens."""
    expected, _ = answers(llm, **CALLS[0])
    ops = llm.model.ops

    def waiting(logits: Tensor, state: DecodeState, workspace: object) -> None:
        state.positions.max().item()

    def baking(logits: Tensor, state: DecodeState, workspace: object) -> None:
        ops.sample_and_advance(logits, state, workspace)
        state.tokens.fill_(state.tokens.tolist()[0])

    llm.decoder = Decoder(llm.model, new_graph=Tape)
    llm.model.ops = SimpleNamespace(**{**vars(ops), "sample_and_advance": waiting})  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="aten::item waits for the device inside a step"):
        llm.generate(PROMPTS, 3, temperature=0)
    llm.model.ops = SimpleNamespace(**{**vars(ops), "sample_and_advance": baking})  # type: ignore[assignment]
    assert answers(llm, **CALLS[0])[0] != expected


def test_rows_end_each_for_its_own_reason(llm: Llama) -> None:
    """Through the decoder alone: budgets of the rows, a stop token, and what came before stays."""
    decoder = llm.decoder
    sampling = SamplingTensors.of(0.0, 1.0, [(0, row, 0) for row in range(3)], torch.device("cpu"))
    with torch.inference_mode(), llm.model.exclusively():
        decoder.start([5, 6, 7], [0, 0, 0], [3, 1, 0], [], sampling)
        for _ in range(4):
            decoder.enqueue_steps()
            decoder.receive()
    written = decoder._state.out_tokens[:4, :3] != 0
    assert written.T.tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4]


@pytest.mark.parametrize(
    ("n_rows", "most", "size"), [(1, 1, 1), (1, 32, 1), (3, 32, 4), (3, 3, 3), (9, 12, 12), (17, 64, 32), (33, 40, 40)]
)
def test_a_batch_is_served_by_the_next_graph(n_rows: int, most: int, size: int) -> None:
    assert graph_size(n_rows, most) == size


def test_output_copies_are_received_in_order_and_never_overwritten() -> None:
    state = DecodeState.of(2, 8, 16, torch.device("cpu"))
    state.out_tokens.copy_(torch.arange(16).view(8, 2))
    copies = OutputCopies(state, n_steps=2, n_buffers=2)
    copies.enqueue(0, 1)
    copies.enqueue(1, 2)
    state.out_tokens.zero_()
    with pytest.raises(RuntimeError, match="all 2 buffers are in flight: receive one first"):
        copies.enqueue(3, 2)
    assert [output.tokens for output in copies.receive()] == [[0, 1]]
    copies.enqueue(3, 2)
    assert [output.tokens for output in copies.receive()] == [[2, 3], [4, 5]]
    copies.clear()
    assert copies.queued == 0


def test_wrong_decoders_are_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="unroll must be at least 1 step, got 0"):
        Decoder(llm.model, unroll=0)
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, and the model is on 'cpu': leave graphs out"):
        Decoder(llm.model, graphs=True)
    llm.decoder.capture_graphs([1])


def test_graphs_are_left_out_where_they_are_not_wanted(llm: Llama) -> None:
    recorder = Recorder()
    llm.decoder = Decoder(llm.model, graphs=False, new_graph=recorder)
    answers(llm, **CALLS[0])
    assert not recorder.tapes


@pytest.mark.parametrize("sizes", [[0], [5], ["x"], 3, "1"])
def test_batch_sizes_out_of_range_are_refused(sizes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph_batch_sizes must be a"):
        Llama.build(str(tmp_path), str(tmp_path), 8, 4, graph_batch_sizes=sizes)


def test_build_warms_the_graphs_that_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(Decoder, "capture_graphs", lambda self, sizes: asked.append(list(sizes)))
    tiny_llama(tmp_path)
    assert asked == [[1, MAX_BATCH_SIZE]]
    args = (str(tmp_path), str(tmp_path / "tokenizer.model"), 16, 4)
    Llama.build(*args, device="cpu", graph_batch_sizes=[2, 3])
    Llama.build(*args, device="cpu", graph_batch_sizes=())
    assert asked[1:] == [[2, 3], []]


def test_a_model_moves_and_its_decoder_follows() -> None:
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32, max_batch_size=2, max_seq_len=8)
    model = Transformer(args)
    revision = model.revision
    model.to(torch.float64)
    assert model.revision > revision
