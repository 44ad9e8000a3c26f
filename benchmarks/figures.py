"""`python -m fastllama.benchmarks.figures`: the README's figures, made from the result files and from nothing else.

Between two marks in the README stands what the files in benchmarks/results/ hold, each figure under the name of its
file. A test compares them, so that a figure without a file cannot stay.
"""

from pathlib import Path

import click

from fastllama.benchmarks.plots import NAMES
from fastllama.benchmarks.report import report
from fastllama.benchmarks.result_file import read_result, write_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: made by `make readme` from benchmarks/results -->", "<!-- end of figures -->"


def figures(results: Path = RESULTS) -> str:
    """Every result file's figures, in Markdown. ValueError for a file that is none."""
    parts = []
    for path in sorted(results.glob("*.json")):
        result = read_result(path)
        environment = result.environment
        name = f"benchmarks/results/{path.name}"
        commit = (environment.git_commit or "unknown")[:10] + (" and changes" if environment.git_dirty else "")
        parts += [
            f"[`{name}`]({name}), {environment.date[:10]}, commit {commit}:",
            f"```\n{environment.command}\n```\n\n{report(result, in_markdown=True)}",
        ]
        plots = [f"{path.stem}/{plot}.png" for plot in NAMES if (results / path.stem / f"{plot}.png").exists()]
        parts += [f"![{Path(plot).stem}](benchmarks/results/{plot})" for plot in plots]
    return "\n\n".join(parts)


def with_figures(text: str, found: str) -> str:
    """The README with these figures between its marks. ValueError where the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} must have the marks {BEGIN!r} and {END!r}, one below the other")
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


@click.command(epilog="Example: python -m fastllama.benchmarks.figures --check")
@click.option("--check", is_flag=True, help="Change nothing; fail where the README has other figures.")
def main(check: bool) -> None:
    """Write the figures of benchmarks/results/ into the README."""
    kept = README.read_text(encoding="utf-8")
    made = with_figures(kept, figures())
    if check and made != kept:
        raise click.ClickException("the README's figures are not those of benchmarks/results: run `make readme`")
    if made != kept:
        write_text(made, README)
        click.echo(f"wrote {README.name}", err=True)


if __name__ == "__main__":
    main()
