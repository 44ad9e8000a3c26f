"""Reads stdin and writes stdout and stderr, even if they are closed, full, or in an encoding that lacks characters.

A byte that cannot be decoded becomes U+FFFD. A character that stdout's encoding lacks becomes an escape such as
\\u2014. Each of these is reported once on stderr. A message that cannot be written to stderr is dropped. A failed write
to stdout is an error, except to a closed stdout, where the user wants no output.
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

# Names of error handlers, for `errors=`; registered below.
UNDECODABLE = "fastllama.undecodable"
UNENCODABLE = "fastllama.unencodable"
UNDECODABLE_NOTICE = "the input is not all {encoding}: what cannot be read became U+FFFD"
UNENCODABLE_NOTICE = (
    "stdout is {encoding}, which lacks some of the characters: they became escapes (PYTHONIOENCODING=utf-8 shows them)"
)
STDOUT_ERROR = "stdout cannot be written: "
UTF_8 = "utf-8"
# Longer marks first, because UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAX_MARK_BYTES = 4
ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")  # how Python represents undecodable bytes of an argument
SURROGATE = re.compile("[\ud800-\udfff]")
MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}

_notices: dict[str, str] = {}  # by error handler: each is written once
_pending: set[str] = set()  # the error handlers whose notices wait for the end of a line


@contextlib.contextmanager
def prepared_streams() -> Iterator[None]:
    """A block in which the three streams exist and stdout takes every character. Afterwards they are restored."""
    _notices.clear()
    _pending.clear()
    with contextlib.ExitStack() as undo:
        _replace_closed_streams(undo)
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper) and _raises_for_unencodable(out):
            undo.callback(out.reconfigure, errors=out.errors)
            out.reconfigure(errors=UNENCODABLE)
        try:
            yield
        finally:
            _write_pending_notices()


def write_stdout(text: str = "", nl: bool = True) -> None:
    """Write `text` to stdout and flush. Raises OSError, which names stdout, if that fails."""
    try:
        click.echo(text, file=sys.stdout, nl=nl)  # without `file`, click writes utf-8 to an ascii stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{STDOUT_ERROR}{error.strerror or error}") from error
    if nl:
        _write_pending_notices()


def write_stderr(text: str) -> None:
    """Write `text` to stderr; drop it if that fails."""
    with contextlib.suppress(OSError):
        click.echo(text, file=sys.stderr)


def one_line(error: BaseException) -> str:
    """An error's message in one line; its type's name if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def stdin_is_terminal() -> bool:
    """Whether stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_terminal(prompt: str) -> str:
    """A line typed at the terminal, with history and cursor keys if Python has readline. EOFError at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != UNDECODABLE:
        sys.stdin.reconfigure(errors=UNDECODABLE)
    return input(prompt)


def read_stdin() -> str:
    """All of stdin, with every line end as \\n."""
    with _stdin_reader(newline=None) as reader:
        text: str = reader.read()
        return text


def stdin_lines() -> Iterator[str]:
    """The lines of stdin as they arrive, without line ends. Only \\n and \\r\\n end a line."""
    with _stdin_reader(newline="\n") as reader:
        for line in reader:
            yield line.removesuffix("\n").removesuffix("\r")


def decoded_argument(text: str) -> str:
    """A command line argument as valid text: bytes that the locale's encoding lacks are decoded as UTF-8."""
    text = ESCAPED_BYTES.sub(lambda found: found[0].encode(UTF_8, "surrogateescape").decode(UTF_8, UNDECODABLE), text)
    if SURROGATE.search(text):
        _report_undecodable(UTF_8)
    return SURROGATE.sub("\ufffd", text)


def flush_or_discard(stream: Any) -> OSError | None:
    """Flush `stream` -> the error, or None. After an error its output is discarded, so that Python exits quietly."""
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
def _stdin_reader(newline: str | None) -> Iterator[Any]:
    """stdin as text, in the encoding of its byte order mark, else in Python's."""
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # closed, or replaced by a caller
        yield sys.stdin or io.StringIO()
        return
    try:
        reader = io.TextIOWrapper(binary, encoding=_encoding(binary), errors=UNDECODABLE, newline=newline)
        try:
            yield reader
        finally:
            reader.detach()
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):
            raise OSError(f"stdin cannot be read: {error.strerror or error}") from error
        raise


def _encoding(binary: Any) -> str:
    if hasattr(binary, "peek"):
        head = binary.peek(MAX_MARK_BYTES)
    else:
        position = binary.tell()
        head = binary.read(MAX_MARK_BYTES)
        binary.seek(position)
    marked = next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), None)
    # Python sets surrogateescape if the locale names no encoding.
    return marked or (UTF_8 if sys.stdin.errors == "surrogateescape" else sys.stdin.encoding) or UTF_8


def _replace_closed_streams(undo: contextlib.ExitStack) -> None:
    """Open /dev/null for closed streams, so that a file opened later does not get descriptor 0, 1 or 2."""
    for descriptor in range(len(MODES)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: `descriptor`
    for name, mode in MODES.items():
        if getattr(sys, name) is None:
            stream = undo.enter_context(open(os.devnull, mode, encoding=UTF_8))  # noqa: SIM115
            setattr(sys, name, stream)
            undo.callback(setattr, sys, name, None)


def _raises_for_unencodable(out: io.TextIOWrapper) -> bool:
    # In utf-8, surrogateescape writes the bytes of file names back. Any other `errors` is the user's choice.
    escapes = out.errors == "surrogateescape" and codecs.lookup(out.encoding).name != UTF_8
    return out.errors == "strict" or escapes


def _write_pending_notices() -> None:
    while _pending:
        write_stderr(_notices[_pending.pop()])


def _report_undecodable(encoding: str) -> None:
    if UNDECODABLE not in _notices:
        _notices[UNDECODABLE] = UNDECODABLE_NOTICE.format(encoding=encoding)
        write_stderr(_notices[UNDECODABLE])


def _replace_undecodable(error: UnicodeError) -> tuple[str | bytes, int]:
    _report_undecodable(getattr(error, "encoding", UTF_8))
    return codecs.replace_errors(error)


def _escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    if UNENCODABLE not in _notices:
        _notices[UNENCODABLE] = UNENCODABLE_NOTICE.format(encoding=getattr(error, "encoding", "not utf-8"))
        _pending.add(UNENCODABLE)
    return codecs.backslashreplace_errors(error)


codecs.register_error(UNDECODABLE, _replace_undecodable)
codecs.register_error(UNENCODABLE, _escape_unencodable)
