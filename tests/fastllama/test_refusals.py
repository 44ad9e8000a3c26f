"""Every refusal of docs/refusals.md: what is refused, the exact message, and that no model was made."""

import ast
import functools
import re
import traceback
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
pytest.importorskip("click", reason="click is not installed")

from docs import refusals
from fastllama import loading
from fastllama.checkpoint.adapter_config import REFUSED_FIELDS
from fastllama.checkpoint.adapter_files import REFUSED_PARTS
from fastllama.checkpoint.unsupported_formats import OTHER_FORMATS
from fastllama.model import Transformer
from tests.support.refusals import adapters, files
from tests.support.refusals.case import chat

CASES = refusals.cases()
MESSAGES = refusals.read_messages(refusals.PAGE.read_text(encoding="utf-8"))


def test_the_page_has_every_case_and_nothing_else() -> None:
    assert len(CASES) == sum(len(listed) for _, _, listed in refusals.SECTIONS), "two cases have the same name"
    assert refusals.page(MESSAGES) == refusals.PAGE.read_text(encoding="utf-8"), "run `make docs`"


class Refusal(NamedTuple):
    """A case's message, the models that were made before, and the lines of files that the errors came through."""

    message: str
    n_models: int
    reached: set[tuple[str, int]]


@functools.cache
def refusal(name: str) -> Refusal:
    made = []

    def counted(*args: object, **kwargs: object) -> object:
        made.append(args)
        return Transformer(*args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastllama.loading.Transformer", counted)
        error: BaseException | None = CASES[name].refused()
    message, reached = str(error), set()
    while error is not None:
        reached |= {(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)}
        error = error.__cause__ or error.__context__
    return Refusal(message, len(made), reached)


@pytest.mark.parametrize("name", CASES)
def test_the_message_is_that_of_the_page(name: str) -> None:
    message = refusal(name).message
    assert message == MESSAGES[name], "run `make docs`, and read what it changes"
    assert "\n" not in message
    assert refusal(name).n_models == (CASES[name].call is chat)


# Completeness


def test_every_entry_of_the_tables_of_refusals_has_a_case() -> None:
    """A GGUF file is in the table because it may lie beside other weights; it loads."""
    assert adapters.REFUSED_FIELDS.keys() == REFUSED_FIELDS.keys()
    for part in REFUSED_PARTS:
        assert any(part in name for name in adapters.REFUSED_PARTS), part
    for pattern in OTHER_FORMATS.keys() - {"*.gguf"}:
        assert any(fnmatch(name, pattern) for name in files.OTHER_FORMATS), pattern


# Words of a message that say that fastllama lacks something, not that a file is damaged.
LACKS = re.compile(
    r"not support|cannot be mapped|an even head_dim|does not dequantise|does not allow|needs a package|WITH_PEFT"
    r"|pickled|quantised|Llama's (arch|layers)|text models|the one to use|describes \{SHARD_PATTERN\}|big-endian"
    r"|has no tokenizer|normalises|other weights"
)
FOLDER = Path(loading.__file__).parent
MODULES = [
    *sorted((FOLDER / "checkpoint").glob("*.py")),
    *sorted(FOLDER.glob("tokenizer_*.py")),
    FOLDER / "gguf_header.py",
]


def test_every_raise_of_what_is_lacking_is_reached() -> None:
    reached = set().union(*(refusal(name).reached for name in CASES))
    lacking = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise) and LACKS.search(ast.get_source_segment(text, node) or ""):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                lacking.append((f"{path.name}:{node.lineno}", any((str(path), line) in reached for line in lines)))
    assert len(lacking) > 15
    assert [place for place, is_reached in lacking if not is_reached] == [], "these have no case"
