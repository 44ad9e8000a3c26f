"""The speculate suite on small models: its records, tables and plot, and answers that differ."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import Llama
from fastllama.benchmarks import plots
from fastllama.benchmarks.bench import Plan, failures, run
from fastllama.benchmarks.ceilings import ReadProbe
from fastllama.benchmarks.compare_results import compare_results
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.near_ties import Parting
from fastllama.benchmarks.report import report
from fastllama.benchmarks.result_file import read_result
from fastllama.benchmarks.suites import speculate
from fastllama.benchmarks.suites.speculate import Speculation
from fastllama.benchmarks.suites.speculate_tasks import TASKS, groups_of, prompts_of

CPU = torch.device("cpu")


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, probe: ReadProbe) -> Plan:
    """Two tasks on the built-in model."""
    monkeypatch.setattr(speculate, "groups_of", lambda n_rows: ["code edit", "story"] if n_rows == 1 else ["mixed"])
    source, sizes = ModelSource.named("builtin"), {"batches": (1, 2), "contexts": (8, 9), "steps": 12, "rounds": 2}
    return Plan(source, CPU, torch.float32, suites=["speculate"], **sizes)  # type: ignore[arg-type]


@pytest.fixture
def one_task(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """One task on the built-in model, measured once."""
    monkeypatch.setattr(speculate, "groups_of", lambda n_rows: ["story"])
    return dataclasses.replace(plan, batches=(1,), rounds=1)


def quiet(text: str) -> None:
    """No progress."""


def test_every_task_is_measured_with_and_without_guesses(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run(plan, quiet, path)
    cases = [(one["batch"], one["task"], one["copies"], one["sampling"]) for one in result.records]
    tasks = [(1, "code edit", True), (1, "story", False), (2, "mixed", None)]
    assert cases == [(*task, sampling) for task in tasks for sampling in ("greedy", "drawn")]
    for one in result.records:
        assert one["partings"] == [] and one["total_output_tokens"] > one["batch"]
        assert one["ratio"]["count"] == 2 and 0 < one["ratio"]["minimum"] <= one["ratio"]["p50"]
        assert one["tokens_per_step"] >= 1 and 0 <= one["acceptance"] <= 1 and 0 <= one["guessing"] < 1
        assert one["plain"]["tokens_per_second"]["p50"] > 0 and one["speculate"] == "lookup"
    assert failures(result) == []
    for in_markdown in (False, True):
        text = report(result, in_markdown)
        assert (
            "answers of builtin in float32, 2 rounds, up to 12 tokens, without and with guesses (lookup, auto)" in text
        )
        assert "code edit" in text and "0 of 2" in text
    assert plots.draw(result, tmp_path / "plots") == [tmp_path / "plots" / "speculate.png"]
    assert not compare_results(read_result(path), read_result(path)).fails


def test_a_draft_model_is_measured(plan: Plan) -> None:
    ckpt_dir = plan.source.ckpt_dir
    plan = dataclasses.replace(plan, speculation=Speculation("draft", ckpt_dir, 3), batches=(1,), rounds=1)
    result = run(plan, quiet)
    for one in result.records:
        assert one["acceptance"] > 0.6 and one["tokens_per_step"] > 1.5 and one["partings"] == []
    assert "guesses (draft of " in report(result)


def test_other_answers_are_a_failure_in_float32_only(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = speculate.build(dataclasses.replace(plan.model, max_seq_len=200), Speculation())
    parted = [Parting(0, 4, True), Parting(1, 7, False)]
    assert speculate._disagreement(llm, parted[:1]) == {}
    found = speculate._disagreement(llm, parted)
    assert found == {"status": "disagrees", "not_run": "row 1 has another token 7 with guesses"}
    llm.model.dtype = torch.bfloat16
    assert speculate._disagreement(llm, parted) == {}


def test_wrong_answers_are_reported(one_task: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = speculate._answers

    def wrong(llm: Llama, *arguments: Any) -> Any:
        found = answers(llm, *arguments)
        if llm.decoder.guesser is not None:
            found.tokens[0][3] = 0
        return found

    monkeypatch.setattr(speculate, "_answers", wrong)
    result = run(one_task, quiet)
    assert failures(result) == ["speculate: row 0 has another token 3 with guesses"]
    assert "not run: row 0 has another token 3 with guesses" in report(result)


def test_near_ties_are_counted_and_no_failure(one_task: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "partings", lambda *_arguments, **_sampling: [Parting(0, 2, True)])
    result = run(one_task, quiet)
    assert failures(result) == []
    assert {speculate.COLUMNS["near ties"](one) for one in result.records} == {1}
    assert {speculate.COLUMNS["part"](one) for one in result.records} == {"1 of 1"}


def test_rows_get_the_texts_of_their_group() -> None:
    assert groups_of(1) == list(TASKS) and groups_of(4) == ["copying", "other", "mixed"]
    assert prompts_of("story", 2) == [TASKS["story"].text] * 2
    mixed = prompts_of("mixed", 4)
    kinds = {task.text: task.copies for task in TASKS.values()}
    assert [kinds[text] for text in mixed] == [True, False, True, False] and len(set(mixed)) == 4
    assert len(set(prompts_of("copying", 5))) == 3


def test_random_weights_take_no_draft_model(one_task: Plan) -> None:
    plan = dataclasses.replace(one_task, source=ModelSource.named("random-toy"))
    assert all(one["partings"] == [] for one in run(plan, quiet).records)
    with pytest.raises(ValueError, match="random-toy has random weights and a vocabulary of its own"):
        run(dataclasses.replace(plan, speculation=Speculation("draft", "somewhere")), quiet)
    with pytest.raises(ValueError, match="the speculate suite measures a model of one process"):
        dataclasses.replace(plan, nproc=2)
