"""`python -m docs.screenshot URL`: writes docs/pictures/chat.png, the chat page of a running server after an answer.

The answer, its speed and the letters are those of the machine, so no test compares the picture's bytes.
"""

from pathlib import Path

import click

from tests.support.chat_page import find_chromium, launch

PATH = Path(__file__).resolve().parent / "pictures" / "chat.png"
MAX_BYTES = 150_000  # it is downloaded with every look at the README
WIDTH, HEIGHT = 1000, 680
ANSWER_SECONDS = 600.0  # for a large model on a CPU


@click.command(epilog="Example: python -m docs.screenshot http://127.0.0.1:8000")
@click.argument("url")
@click.option("--question", "questions", multiple=True, default=["What is the capital of France?"], show_default=True)
@click.option("--theme", type=click.Choice(["light", "dark"]), default="light", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=PATH, help="Default: docs/pictures/chat.png")
def main(url: str, questions: tuple[str, ...], theme: str, output: Path) -> None:
    """Ask the server at URL the questions, one conversation each, and save what the page shows."""
    path = find_chromium()
    if path is None:
        raise click.ClickException("no chromium here: apt-get install chromium")
    picture = draw(path, url, questions, theme)
    if len(picture) > MAX_BYTES:
        raise click.ClickException(f"the picture has {len(picture):,} bytes, more than {MAX_BYTES:,}: ask for less")
    output.write_bytes(picture)
    click.echo(f"wrote {output.name}: {len(picture):,} bytes", err=True)


def draw(chromium: str, url: str, questions: tuple[str, ...], theme: str) -> bytes:
    """The page as a PNG, after the last question's answer. Raises ClickException if a question has none."""
    with launch(chromium) as browser:
        context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=theme)  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(ANSWER_SECONDS * 1000)
        page.goto(url)
        for question in questions:
            page.keyboard.press("Control+k")
            field = page.get_by_label("Message", exact=True)
            field.fill(question)
            field.press("Enter")
            page.locator(".stats").wait_for()
            if page.locator(".error").count():
                raise click.ClickException(page.locator(".error p").inner_text())
        return page.screenshot()


if __name__ == "__main__":
    main()
