"""The GPU report's section about steps that check guesses."""

from pathlib import Path

import pytest
import torch

from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.gpu_report import speculation
from fastllama.benchmarks.gpu_report.markdown import summary
from fastllama.benchmarks.gpu_report.measurements import Bench
from fastllama.benchmarks.gpu_report.sizes import TOY
from fastllama.benchmarks.result_file import ResultFile
from fastllama.speculation_limits import expected_tokens


@pytest.mark.slow
def test_every_number_of_guesses_is_timed_beside_plain_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "GOALS", {1: 1.1})
    # Enough steps that guessing is timed, and rows that leave room for one guess each.
    sizes = TOY._replace(guesses=(1, 2), batches=(1, 8), contexts=(8,), prompts=(40,), steps=3)
    bench = Bench(torch.device("cpu"), sizes, tmp_path)
    records = [record for record in speculation.speculation(bench) if isinstance(record, dict)]
    cases = [(one["draft"], one["batch"], one["guesses"], one["goal"]) for one in records]
    assert cases == [
        (None, 1, 1, 1.1),
        (None, 1, 2, None),
        (None, 8, 1, None),
        ("toy", 1, 1, None),
        ("toy", 1, 2, None),
    ]
    for one in records:
        assert one["cost"] == pytest.approx(one["step_milliseconds"] / one["plain_milliseconds"])
        seconds = one["step_milliseconds"] / 1e3
        expected = one["batch"] * expected_tokens(0.7, one["guesses"]) / seconds
        assert one["tokens_per_second_at_70%"] == pytest.approx(expected)
        assert 0 < one["guess_milliseconds"] < one["step_milliseconds"]
    page = summary(ResultFile(describe_environment("cpu"), {}, [{"suite": "speculation", **one} for one in records]))
    assert "## Steps that check guesses" in page and "| guess milliseconds |" in page
