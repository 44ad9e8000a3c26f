"""The README's figures: those of the result files, and no others."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fastllama.benchmarks import figures
from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import ResultFile, write_result
from fastllama.benchmarks.statistics import summarize


def test_the_readme_holds_the_figures_of_the_result_files() -> None:
    kept = figures.README.read_text(encoding="utf-8")
    assert figures.with_figures(kept, figures.figures()) == kept, "run `make readme`"


def test_every_file_is_named_with_its_figures_and_plots(tmp_path: Path) -> None:
    ceiling = Ceiling("read", "GB/s", "by hand", summarize([12.5]))
    for name in ("one", "two"):
        write_result(ResultFile(describe_environment("cpu"), {"read": ceiling}), tmp_path / f"{name}.json")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "throughput.png").write_bytes(b"")
    found = figures.figures(tmp_path)
    assert found.index("results/one.json") < found.index("results/two.json")
    assert found.count("12.5 GB/s") == 2
    assert found.count("![throughput](benchmarks/results/two/throughput.png)") == 1 and "latency" not in found


def test_figures_stand_between_the_marks_alone() -> None:
    text = f"above\n{figures.BEGIN}\nold\n{figures.END}\nbelow\n"
    assert figures.with_figures(text, "new") == f"above\n{figures.BEGIN}\nnew\n{figures.END}\nbelow\n"
    with pytest.raises(ValueError, match="must have the marks"):
        figures.with_figures("no marks", "new")


def test_check_fails_on_other_figures_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{figures.BEGIN}\n1000 tokens/s\n{figures.END}\n")
    monkeypatch.setattr(figures, "README", path)
    monkeypatch.setattr(figures, "figures", lambda: "10 tokens/s")
    run = CliRunner()
    assert run.invoke(figures.main, ["--check"]).exit_code == 1 and "1000" in path.read_text()
    assert run.invoke(figures.main, []).exit_code == 0 and "1000" not in path.read_text()
    assert run.invoke(figures.main, ["--check"]).exit_code == 0
