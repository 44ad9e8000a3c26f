"""A case on ours and the peers: outputs are compared first, and runs alternate."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from fastllama.benchmarks.ceilings import ReadProbe
from fastllama.benchmarks.report import notes
from fastllama.benchmarks.runners import Runner
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import decode, generate, interleaved
from fastllama.benchmarks.suites.interleaved import Case
from fastllama.benchmarks.tables import peer_columns, table_of
from tests.benchmarks.cases import ARGS, CASE, RAGGED, Scripted


def record_of(ours: Runner, peer: Runner | str, probe: ReadProbe, case: Case = CASE) -> dict[str, Any]:
    messages: list[str] = []
    measured = interleaved.run_case(
        case, ARGS.vocab_size, ours, {"reference": peer}, probe, torch.float32, messages.append
    )
    assert messages[0] == "comparing outputs"
    record = dataclasses.asdict(case) | decode.record(case, measured, ARGS, torch.float32)
    json.dumps(record, allow_nan=False)
    return record


def shown(records: list[dict[str, Any]]) -> str:
    """The printed table of records."""
    columns = generate.COLUMNS if records[0]["suite"] == "generate" else decode.COLUMNS
    return "\n".join([table_of(records, {**columns, **peer_columns(records)}).text(), *notes(records)])


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("context", 0), ("steps", 1), ("rounds", 0)])
def test_case_rejects_sizes_that_measure_nothing(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        dataclasses.replace(CASE, **{name: value})  # type: ignore[arg-type]


def test_case_prompts_differ_by_row_and_repeat() -> None:
    prompts = CASE.prompts(600)
    assert [len(prompt) for prompt in prompts] == [5, 5] and prompts[0] != prompts[1]
    assert prompts == CASE.prompts(600)
    assert all(0 <= token < 600 for prompt in prompts for token in prompt)


def test_ragged_prompts_shrink_from_the_longest_to_a_quarter() -> None:
    assert RAGGED.lengths == [12, 8, 3] and [len(prompt) for prompt in RAGGED.prompts(600)] == [12, 8, 3]
    assert Case("generate", 1, 9).lengths == [9] and Case("prefill", 2, 9, 1).lengths == [9, 9]
    assert Case("generate", 2, 1).lengths == [1, 1]


def test_outputs_are_compared_first_then_runs_alternate(probe: ReadProbe) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.03, log), probe)
    assert log == ["ours?", "peer?", "ours", "peer", "peer", "ours"]
    peer = record["peers"]["reference"]
    assert peer["status"] == "measured" and peer["agreement"]["tokens_compared"] == 8
    assert peer["ratio"]["p50"] == pytest.approx(3.0)
    assert record["tokens_per_second"]["p50"] == pytest.approx(200.0)
    assert peer["tokens_per_second"]["p50"] == pytest.approx(200.0 / 3)
    assert "3.00x" in shown([record])


def test_a_share_uses_the_higher_adjacent_sample(probe: ReadProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([10.0, 30.0, 20.0, 40.0, 20.0, 10.0])
    monkeypatch.setattr(probe, "sample", lambda: summarize([next(rates)]))
    record = record_of(Scripted("ours", 0.01, []), Scripted("peer", 0.01, []), probe)
    # Ours runs between samples 1 and 2, then between 5 and 6; the peer between 2 and 3, then 4 and 5.
    assert (record["read_gb_per_second"]["minimum"], record["read_gb_per_second"]["maximum"]) == (20.0, 30.0)
    assert record["peers"]["reference"]["read_gb_per_second"]["p50"] == 35.0


def test_a_wrong_peer_is_reported_and_not_timed(probe: ReadProbe) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.001, log, tokens=8), probe)
    assert log == ["ours?", "peer?", "ours", "ours"]
    peer = record["peers"]["reference"]
    assert peer["status"] == "disagrees" and "our token 7, the peer's 8" in peer["reason"]
    assert "tokens_per_second" not in peer and "ratio" not in peer
    text = shown([record])
    assert "disagrees" in text and "x (" not in text


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_peer_that_fails_is_reported_and_left_out(probe: ReadProbe, fails_at: int) -> None:
    log: list[str] = []
    record = record_of(Scripted("ours", 0.01, log), Scripted("peer", 0.01, log, fails_at=fails_at), probe)
    assert record["peers"]["reference"]["status"] == "failed"
    assert record["peers"]["reference"]["reason"] == "it broke"
    assert "ratio" not in record["peers"]["reference"]
    assert record["tokens_per_second"]["count"] == CASE.rounds


def test_a_missing_peer_is_skipped_with_the_reason(probe: ReadProbe) -> None:
    record = record_of(Scripted("ours", 0.01, []), "llama_models not installed", probe)
    assert record["peers"]["reference"] == {"status": "skipped", "reason": "llama_models not installed"}
    assert "reference skipped: llama_models not installed" in shown([record])


def test_table_is_aligned_and_notes_other_programs(probe: ReadProbe) -> None:
    quiet = record_of(Scripted("ours", 0.01, []), "absent", probe) | {"other_cores": 0.0}
    lines = shown([quiet, *({**quiet, "batch": 16, "other_cores": cores} for cores in (1.5, 0.5))]).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert sum("other programs used up to 1.5 cores during 2 of 3" in line for line in lines) == 1
    assert "other programs" not in shown([quiet])


def test_a_wrong_peer_is_not_timed_in_generate(probe: ReadProbe) -> None:
    log: list[str] = []
    wrong = Scripted("peer", 0.001, log, tokens=8)
    found = interleaved.run_case(
        RAGGED, 600, Scripted("ours", 0.01, log), {"reference": wrong}, probe, torch.float32, lambda text: None
    )
    record = generate.record(RAGGED, found, ARGS, torch.float32, matmul=1.0)
    assert record["peers"]["reference"]["status"] == "disagrees" and "seconds" not in record["peers"]["reference"]
    assert "disagrees" in shown([dataclasses.asdict(RAGGED) | record])
    assert "peer" not in log
