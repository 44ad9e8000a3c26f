"""The page docs/refusals.md is written and checked. tests/fastllama/test_refusals.py compares its messages."""

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from docs import refusals
from tests.support.refusals.case import Refusal


def refuse() -> None:
    raise ValueError("model: a | b, run `x`, <|c|>")


def test_check_fails_on_another_page_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "refusals.md"
    monkeypatch.setattr(refusals, "PAGE", path)
    monkeypatch.setattr(refusals, "SECTIONS", [("Files", "", [Refusal("`a`", lambda: None, refuse)])])
    path.write_text("another")
    result = CliRunner().invoke(refusals.main, ["--check"])
    assert result.exit_code == 1 and "is not what the code raises" in result.output and path.read_text() == "another"
    assert CliRunner().invoke(refusals.main, []).exit_code == 0
    assert r"| `a` | `` model: a \| b, run `x`, <\|c\|> `` |" in path.read_text()
    assert refusals.read_messages(path.read_text()) == {"Files: `a`": "model: a | b, run `x`, <|c|>"}
    assert CliRunner().invoke(refusals.main, ["--check"]).output == ""


def test_a_case_that_is_not_refused_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a: it is not refused"):
        Refusal("a", lambda: None, lambda: None).refused()
    with pytest.raises(RuntimeError, match="a: expected AssertionError"):
        Refusal("a", lambda: None, refuse, AssertionError).refused()
