"""The figures in docs/benchmarks.md: exactly the figures of the result files."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastllama.benchmarks import update_docs
from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.result_file import ResultFile, read_result, write_result
from fastllama.benchmarks.statistics import summarize

CPU_RESULTS = "cpu-amd-epyc-2-threads-176m"
README = update_docs.ROOT / "README.md"
SPEED = re.compile(r"[0-9]\s*(tokens/s|tokens per second|GB/s|TB/s|TFLOP/s|µs|ms|x\b|×|times as fast|%)")


def test_the_page_holds_the_figures_of_the_result_files() -> None:
    kept = update_docs.PAGE.read_text(encoding="utf-8")
    assert update_docs.with_figures(kept, update_docs.figures()) == kept, "run `make docs`"


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_the_readmes_figures_of_quantised_weights_are_those_of_their_files(choice: str) -> None:
    (record,) = (
        one for one in read_result(update_docs.RESULTS / f"{CPU_RESULTS}-{choice}.json").records if one["batch"] == 1
    )
    ratio = record["peers"]["llama.cpp"]["ratio"]["p50"]
    cells = f"{record['bytes_per_step'] / 1e6:.0f} MB | {record['tokens_per_second']['p50']:.0f} | {ratio:.2f}"
    assert f"| `{choice}` | {cells} |" in README.read_text(encoding="utf-8")


def test_the_readme_states_no_other_speed_outside_its_picture() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 120, "details belong in docs/"
    plot, page = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert plot.startswith("benchmarks/results/") and (update_docs.ROOT / plot).exists()
    assert page.startswith("docs/pictures/") and (update_docs.ROOT / page).exists()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)  # the output of commands stays
    assert not SPEED.findall(prose), "put figures into docs/benchmarks.md, where they come from result files"


def test_every_file_is_named_with_its_figures_and_plots(tmp_path: Path) -> None:
    ceiling = Ceiling("read", "GB/s", "by hand", summarize([12.5]))
    for name in ("one", "two"):
        write_result(ResultFile(describe_environment("cpu"), {"read": ceiling}), tmp_path / f"{name}.json")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "throughput.png").write_bytes(b"")
    found = update_docs.figures(tmp_path)
    assert found.index("results/one.json") < found.index("results/two.json")
    assert found.count("12.5 GB/s") == 2
    assert found.count("![throughput of two](../benchmarks/results/two/throughput.png)") == 1
    assert "latency" not in found


def test_figures_are_written_between_the_marks() -> None:
    text = f"above\n{update_docs.BEGIN}\nold\n{update_docs.END}\nbelow\n"
    assert update_docs.with_figures(text, "new") == f"above\n{update_docs.BEGIN}\nnew\n{update_docs.END}\nbelow\n"
    with pytest.raises(ValueError, match="must have the marks"):
        update_docs.with_figures("no marks", "new")


def test_check_fails_on_other_figures_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "benchmarks.md"
    path.write_text(f"{update_docs.BEGIN}\n1000 tokens/s\n{update_docs.END}\n")
    monkeypatch.setattr(update_docs, "PAGE", path)
    monkeypatch.setattr(update_docs, "figures", lambda: "10 tokens/s")
    run = CliRunner()
    assert run.invoke(update_docs.main, ["--check"]).exit_code == 1 and "1000" in path.read_text()
    assert run.invoke(update_docs.main, []).exit_code == 0 and "1000" not in path.read_text()
    assert run.invoke(update_docs.main, ["--check"]).exit_code == 0
