"""Rows are moved to low numbers, so that steps run no more rows than they need."""

from pathlib import Path

import pytest
import torch

from fastllama import Llama, SamplingParams
from fastllama.decode_graph import Decoder
from fastllama.engine.scheduler import rows_in_use
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.decode_state import INACTIVE, DecodeState
from fastllama.kernels.sampling.controls import RowControls
from tests.support.tiny import tiny_llama

CONTROLLED = SamplingParams(max_gen_len=60, temperature=0.9, seed=3, frequency_penalty=0.7, top_k=30, logprobs=2)


class Ahead(Decoder):
    """Queues steps ahead of the output that is read, as on a GPU."""

    @property
    def replays_ahead(self) -> int:
        return 2


@pytest.fixture(params=[Decoder, Ahead], ids=["in step", "ahead"])
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Llama:
    llm = tiny_llama(tmp_path, max_seq_len=128)
    llm.decoder = request.param(llm.model)
    llm.tokenizer.stop_tokens = set()
    return llm


@pytest.mark.parametrize("params", [SamplingParams(max_gen_len=60, temperature=0.9, seed=3), CONTROLLED])
def test_a_moved_row_goes_on_as_if_alone(llm: Llama, params: SamplingParams) -> None:
    alone = llm.engine(reuse_prefixes=False).submit([5, 6, 7], params).result().answer
    engine = llm.engine(reuse_prefixes=False)
    short = [engine.submit([9, number], SamplingParams(max_gen_len=4, seed=1)) for number in range(3)]
    long = engine.submit([5, 6, 7], params)
    rows = []
    while engine.step():
        rows.append(rows_in_use(engine._core.scheduler.running))
    assert all(request.is_finished for request in short) and max(rows) == 4 and rows[-2] == 1
    assert long.result().answer.tokens == alone.tokens
    assert long.result().answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_rows_stay_where_steps_would_not_become_smaller(llm: Llama) -> None:
    """Four rows and three need the step of four."""
    engine = llm.engine()
    requests = [engine.submit([9, n], SamplingParams(max_gen_len=3 if n == 1 else 40, seed=1)) for n in range(4)]
    for _ in range(10):
        engine.step()
    assert requests[1].is_finished
    assert [request.sequences[0].row for request in requests] == [0, None, 2, 3]
    engine.close()


def test_all_of_a_row_is_moved() -> None:
    device = torch.device("cpu")
    state = DecodeState.of(4, 4, 16, device).with_extras()
    state.start_rows([3], [7], [20], [18], [90])
    state.set_stops([3], [[2, 5]])
    state.sampling.set_rows(torch.tensor([3]), SamplingTensors.of(0.8, 0.7, [(11, 12, 13)], device))
    assert state.controls is not None
    state.controls.set_row(3, RowControls(1.5, 0.5, 0.25, 0.1, 9, 25, {4: 2.0}, [1, 2], [3, 3]))
    expected = [tensor[3].clone() for tensor in state.controls.tensors]
    state.move_rows([3], [1])
    assert state.positions.tolist() == [INACTIVE, 20, INACTIVE, INACTIVE]
    assert [int(one[1]) for one in (state.tokens, state.starts, state.last)] == [7, 18, 90]
    assert state.is_stop[1].nonzero().flatten().tolist() == [2, 5]
    assert [float(getattr(state.sampling, name)[1]) for name in ("temperature", "top_p", "seed", "stream", "call")] == [
        *(0.8, 0.7),
        *(11, 12, 13),
    ]
    for tensor, wanted in zip(state.controls.tensors, expected, strict=True):
        assert torch.equal(tensor[1], wanted)
