"""The figures in docs/benchmarks.md, written from the result files and from nothing else: `make docs`.

The section between two marks in that page shows each file in benchmarks/results/ under its name. A test compares both,
so that every figure in the section comes from a file.
"""

from pathlib import Path

import click

from fastllama.benchmarks.plots import NAMES
from fastllama.benchmarks.report import report
from fastllama.benchmarks.result_file import read_result, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_LINK = "../benchmarks/results"  # from the page
BEGIN, END = "<!-- figures: made by `make docs` from benchmarks/results -->", "<!-- end of figures -->"


def figures(results: Path = RESULTS) -> str:
    """Every result file's figures, in Markdown. ValueError for a file that is no result file."""
    parts = []
    for path in sorted(results.glob("*.json")):
        result = read_result(path)
        environment = result.environment
        commit = (environment.git_commit or "unknown")[:10] + (" and changes" if environment.git_dirty else "")
        link = f"[`benchmarks/results/{path.name}`]({RESULTS_LINK}/{path.name})"
        parts += [
            f"### {path.stem}",
            f"{link}, {environment.date[:10]}, commit {commit}:",
            f"```\n{environment.command}\n```\n\n{report(result, in_markdown=True)}",
        ]
        plots = [f"{path.stem}/{plot}.png" for plot in NAMES if (results / path.stem / f"{plot}.png").exists()]
        parts += [f"![{Path(plot).stem} of {path.stem}]({RESULTS_LINK}/{plot})" for plot in plots]
    return "\n\n".join(parts)


def with_figures(text: str, found: str) -> str:
    """The page's text with these figures between its marks. ValueError if the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} must have the marks {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


@click.command(epilog="Example: python -m fastllama.benchmarks.update_docs --check")
@click.option("--check", is_flag=True, help="Change nothing; fail where the page has other figures.")
def main(check: bool) -> None:
    """Write the figures of benchmarks/results/ into docs/benchmarks.md."""
    kept = PAGE.read_text(encoding="utf-8")
    made = with_figures(kept, figures())
    if check and made != kept:
        raise click.ClickException(f"{PAGE.name} has other figures than benchmarks/results: run `make docs`")
    if made != kept:
        write_text(made, PAGE)
        click.echo(f"wrote {PAGE.name}", err=True)


if __name__ == "__main__":
    main()
