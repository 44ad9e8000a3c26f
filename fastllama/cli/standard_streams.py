"""stdin, stdout and stderr as the program finds them: closed, full, or in an encoding that lacks characters.

What cannot be read becomes U+FFFD, what cannot be shown an escape such as \\u2014; either is said once, on stderr.
Where stderr takes nothing, what would be said there is dropped. A stdout that takes nothing is an error, but for a
closed one: who closes it wants nothing.
"""

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

# Names of what is done about a character, for `errors=`; registered below.
UNREADABLE = "fastllama.unreadable"
UNSHOWABLE = "fastllama.unshowable"
UNREADABLE_NOTICE = "the input is not all {encoding}: what cannot be read became U+FFFD"
UNSHOWABLE_NOTICE = (
    "stdout is {encoding}, which lacks some of the characters: they became escapes (PYTHONIOENCODING=utf-8 shows them)"
)
UNWRITTEN = "stdout cannot be written: "
UTF_8 = "utf-8"
# Longest first, because one begins another.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LONGEST_MARK = 4
ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")  # how Python keeps bytes of an argument that it cannot read
SURROGATE = re.compile("[\ud800-\udfff]")
MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}

_notices: dict[str, str] = {}  # by what they are about, once said or due
_due: set[str] = set()  # those that wait for the end of a line


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """A block in which the three streams are there and stdout takes every character; afterwards they are as before."""
    _notices.clear()
    _due.clear()
    with contextlib.ExitStack() as undo:
        _fill_closed(undo)
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper) and _refuses_characters(out):
            undo.callback(out.reconfigure, errors=out.errors)
            out.reconfigure(errors=UNSHOWABLE)
        try:
            yield
        finally:
            _say_due()


def say(text: str = "", nl: bool = True) -> None:
    """Print `text` at once. OSError, which names stdout, where it takes nothing."""
    try:
        click.echo(text, file=sys.stdout, nl=nl)  # left to itself, click writes utf-8 where Python says ascii
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{UNWRITTEN}{error.strerror or error}") from error
    if nl:
        _say_due()


def note(text: str) -> None:
    """Say `text` on stderr, where it takes it."""
    with contextlib.suppress(OSError):
        click.echo(text, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def at_terminal() -> bool:
    """Whether stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_terminal(prompt: str) -> str:
    """A line that is typed, with history and cursor keys where this Python has them. EOFError at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != UNREADABLE:
        sys.stdin.reconfigure(errors=UNREADABLE)
    return input(prompt)


def read_all() -> str:
    """All that comes from stdin, every end of a line as \\n."""
    with _reader(newline=None) as text:
        whole: str = text.read()
        return whole


def lines() -> Iterator[str]:
    """The lines of stdin as they come, without their ends. \\n ends a line, and \\r\\n; nothing else does."""
    with _reader(newline="\n") as text:
        for line in text:
            yield line.removesuffix("\n").removesuffix("\r")


def readable(text: str) -> str:
    """An argument of the command line, bytes in it that the locale's encoding lacks taken as UTF-8."""
    text = ESCAPED_BYTES.sub(lambda found: found[0].encode(UTF_8, "surrogateescape").decode(UTF_8, UNREADABLE), text)
    if SURROGATE.search(text):
        _note_unreadable(UTF_8)
    return SURROGATE.sub("\ufffd", text)


def settle(stream: Any) -> OSError | None:
    """What keeps `stream` from taking what was written, which is then dropped, so that the interpreter ends quietly."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
        return error
    except ValueError:  # closed by its owner
        return None
    return None


@contextlib.contextmanager
def _reader(newline: str | None) -> Iterator[Any]:
    """stdin as text, which reads what its first bytes say it is, or what Python takes it for."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # closed, or a caller's own
        yield sys.stdin or io.StringIO()
        return
    try:
        text = io.TextIOWrapper(binary, encoding=_encoding(binary), errors=UNREADABLE, newline=newline)
        try:
            yield text
        finally:
            text.detach()
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):
            raise OSError(f"stdin cannot be read: {error.strerror or error}") from error
        raise


def _encoding(binary: Any) -> str:
    if hasattr(binary, "peek"):
        head = binary.peek(LONGEST_MARK)
    else:
        place = binary.tell()
        head = binary.read(LONGEST_MARK)
        binary.seek(place)
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    # Python says surrogateescape where the locale says nothing of an encoding.
    return marked or (UTF_8 if sys.stdin.errors == "surrogateescape" else sys.stdin.encoding) or UTF_8


def _fill_closed(undo: contextlib.ExitStack) -> None:
    """/dev/null in the place of streams that are closed: no file that is opened later gets their numbers."""
    for descriptor in range(len(MODES)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this
    for name, mode in MODES.items():
        if getattr(sys, name) is None:
            stream = undo.enter_context(open(os.devnull, mode, encoding=UTF_8))  # noqa: SIM115
            setattr(sys, name, stream)
            undo.callback(setattr, sys, name, None)


def _refuses_characters(out: io.TextIOWrapper) -> bool:
    # In utf-8 only bytes of a file's name can fail, and surrogateescape gives them back. Other ways are the user's own.
    escapes = out.errors == "surrogateescape" and codecs.lookup(out.encoding).name != UTF_8
    return out.errors == "strict" or escapes


def _say_due() -> None:
    while _due:
        note(_notices[_due.pop()])


def _note_unreadable(encoding: str) -> None:
    if UNREADABLE not in _notices:
        _notices[UNREADABLE] = UNREADABLE_NOTICE.format(encoding=encoding)
        note(_notices[UNREADABLE])


def _unreadable(error: UnicodeError) -> tuple[str | bytes, int]:
    _note_unreadable(getattr(error, "encoding", UTF_8))
    return codecs.replace_errors(error)


def _unshowable(error: UnicodeError) -> tuple[str | bytes, int]:
    if UNSHOWABLE not in _notices:
        _notices[UNSHOWABLE] = UNSHOWABLE_NOTICE.format(encoding=getattr(error, "encoding", "not utf-8"))
        _due.add(UNSHOWABLE)
    return codecs.backslashreplace_errors(error)


codecs.register_error(UNREADABLE, _unreadable)
codecs.register_error(UNSHOWABLE, _unshowable)
