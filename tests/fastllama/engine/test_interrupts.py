"""A step that is interrupted anywhere, as by Ctrl-C, leaves an engine that works and loses no page."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastllama import SamplingParams
from tests.fastllama.engine.simulated import answer_alone, simulated_engine, small_pages
from tests.support.tiers import parameters

FILES = {"core.py", "scheduler.py", "page_pool.py", "sequence.py", "recovery.py", "inbox.py"}
PARAMS = SamplingParams(max_gen_len=9, n=2, stop="ab")
PROMPTS = [[1, 2, 3, 4, 5, number] for number in range(5)]


class Interrupt:
    """Traces lines of the engine's files, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.name not in FILES or frame.f_code.co_name == "fail" or self.left < 0:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("first", parameters({str(first): first for first in range(8)}, quick={"0"}))
def test_an_interrupt_at_any_line_leaves_a_working_engine(first: int) -> None:
    interrupted = 0
    with small_pages():
        for at in range(19 * first, 6000, 151):
            engine = simulated_engine(rows=3, pages=8, max_seq_len=20, ahead=1)
            runner = engine.llm.decoder.runner  # type: ignore[attr-defined]
            runner.fails_in = ("", "step", "prefill")[at % 3]  # so that the recovery is interrupted, too
            requests = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
            before = sys.gettrace()
            sys.settrace(Interrupt(at))
            try:
                engine.run()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(before)
                runner.fails_in = ""
            assert all(request.is_finished for request in requests)
            assert engine._core.scheduler.pool.n_available == 8 and engine._held is None
            request = engine.submit(PROMPTS[0], PARAMS)
            for answer in request.result().answers:
                assert answer.tokens == answer_alone(PROMPTS[0], PARAMS, answer.index, 20)[0]
            assert engine._core.scheduler.pool.n_available == 8
    assert interrupted > 12
