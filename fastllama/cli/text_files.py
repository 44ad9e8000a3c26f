"""Reads a text file that an option names."""

from pathlib import Path

import click


def read_text(path: str, option: str) -> str:
    """The file's text. UsageError, which names the option, for a file that cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{option} {path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option} {path}: expected text in UTF-8 ({error}).") from error
