"""The program `fastllama`: its commands, and how every one of them fails."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.bench import bench
from fastllama.cli.chat import chat
from fastllama.cli.complete import complete
from fastllama.cli.inspect import inspect
from fastllama.cli.options import Follows
from fastllama.distributed import environment

PROGRAM = "fastllama"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 1  # nobody reads what is printed
NO_ROOM_FOR_LIBRARY = ("failed to map segment", "cannot allocate memory")  # what the loader says of one


class Program(click.Group):
    """A group that turns what went wrong into one line on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """As click's, whose own handling of errors and exit codes this replaces in standalone mode.

        A reader that went away (`| head`) ends it quietly, with 1.
        """
        options["prog_name"] = options.get("prog_name") or PROGRAM
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **options)
        with standard_streams.prepared():
            streams = sys.stdout, sys.stderr
            try:
                code = _exit_code(run, *args, standalone_mode=False, **options)
            finally:
                sys.stdout, sys.stderr = streams  # click puts others there when a reader went away
                unwritten = _unwritten()
        sys.exit(unwritten or code)


def _exit_code(run: Callable[..., Any], *args: Any, **options: Any) -> int:
    """What a run comes to, its error said."""
    try:
        code = _shared(run, *args, **options)
    except click.exceptions.NoArgsIsHelpError as error:
        standard_streams.note(error.format_message())
        return EXIT_ERROR
    except click.ClickException as error:
        return fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit as end:  # click's, at a reader that went away
        return end.code if isinstance(end.code, int) else EXIT_ERROR
    except Exception as error:
        if not is_expected(error):
            raise
        if isinstance(error, OSError) and (code := _unwritten()):
            return code
        return fail(standard_streams.one_line(error))
    return code if isinstance(code, int) else 0


def _shared(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run in one process. Of those that a launcher started it is the first; the others follow it, and print nothing."""
    if _is_another():
        return _follow(run, *args, **options)
    code = run(*args, **options)
    if "fastllama.distributed.driver" in sys.modules:
        from fastllama.distributed import driver

        driver.shut_down()
    return code


def _is_another() -> bool:
    try:
        found = environment.several()
    except ValueError:  # a command for which that matters says so
        return False
    return found is not None and found.rank > 0


def _follow(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run up to where a model is built, and follow the first process from there. What comes before, that one says."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run(*args, **options)
    except Follows:
        from fastllama.distributed import worker

        return worker.run_worker()
    except click.ClickException:
        return EXIT_ERROR


def _unwritten() -> int:
    """The exit code where stdout does not take what was printed, said; else 0."""
    broken, _ = (standard_streams.settle(stream) for stream in (sys.stdout, sys.stderr))
    if broken is None:
        return 0
    if isinstance(broken, BrokenPipeError):
        return EXIT_UNREAD
    return fail(f"{standard_streams.UNWRITTEN}{broken.strerror or broken}")


def fail(message: str) -> int:
    """Say `message` in one line on stderr -> the exit code."""
    standard_streams.note(f"{PROGRAM}: error: {' '.join(message.split())}")
    return EXIT_ERROR


def is_expected(error: Exception) -> bool:
    """Whether `error` is one that the input or the machine causes, rather than a fault in the program."""
    if isinstance(error, ValueError | AssertionError | OSError | MemoryError):
        return True
    # torch reports a CPU that is out of memory, and a device that is not there, as a bare RuntimeError.
    parallel = sys.modules.get("fastllama.distributed.parallel")
    if parallel is not None and isinstance(error, parallel.ProcessFailed):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    limits = sys.modules.get("fastllama.memory_plan")
    words = limits.OUT_OF_MEMORY_WORDS if limits is not None and isinstance(error, RuntimeError) else ()
    if isinstance(error, ImportError):
        words = NO_ROOM_FOR_LIBRARY
    return any(word in str(error).lower() for word in words)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from fastllama import __version__

        click.echo(f"{PROGRAM} {__version__}")
        context.exit()


@click.group(
    cls=Program,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Meta's flags have underscores; hyphens mean the same.
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "max_content_width": 100,
    },
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def program() -> None:
    """Run Llama 3 models: complete text, chat, look at a checkpoint, measure speed.

    Without a checkpoint the small model in the package is used.

    \b
    Examples:
      fastllama complete "Once upon a time"
      fastllama chat --ckpt_dir Meta-Llama-3-8B-Instruct
    """


for command in (complete, chat, inspect, bench):
    program.add_command(command)
