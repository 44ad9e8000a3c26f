"""`python -m docs.pictures`: writes docs/pictures/."""

from pathlib import Path

import click

from docs.pictures import attention, dependent_launch, engine, layer, matvec, speculation
from fastllama.benchmarks.result_file import write_text

FOLDER = Path(__file__).resolve().parent
PICTURES = {
    "layer.svg": layer.draw,
    "matvec.svg": matvec.draw,
    "attention.svg": attention.draw,
    "dependent-launch.svg": dependent_launch.draw,
    "engine.svg": engine.draw,
    "speculation.svg": speculation.draw,
}


@click.command(epilog="Example: python -m docs.pictures")
@click.option("--check", is_flag=True, help="Change nothing; fail where docs/pictures/ has other pictures.")
def main(check: bool) -> None:
    """Draw the pictures of docs/kernels.md, docs/engine.md and docs/speculation.md into docs/pictures/."""
    for name, draw in PICTURES.items():
        path = FOLDER / name
        kept = path.read_text(encoding="utf-8") if path.exists() else None
        if kept == draw():
            continue
        if check:
            raise click.ClickException(f"{path} is not what the code draws: run `make docs`")
        write_text(draw(), path)
        click.echo(f"wrote {path.name}", err=True)


if __name__ == "__main__":
    main()
