"""The program `fastllama`: its commands, error messages and exit codes."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

import click

from fastllama.cli import standard_streams
from fastllama.cli.batch import batch
from fastllama.cli.bench import bench
from fastllama.cli.chat import chat
from fastllama.cli.complete import complete
from fastllama.cli.inspect import inspect
from fastllama.cli.options import RunAsWorker
from fastllama.cli.quality import quality
from fastllama.cli.quantize import quantize
from fastllama.cli.serve import serve
from fastllama.distributed import environment

PROGRAM = "fastllama"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 1
LOADER_OUT_OF_MEMORY_WORDS = ("failed to map segment", "cannot allocate memory")  # in an ImportError of a library


class Program(click.Group):
    """A click group that reports an error as one line on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """click's `main`, with our own handling of errors and exit codes in standalone mode.

        A closed pipe (`| head`) ends the program quietly, with exit code 1.
        """
        options["prog_name"] = options.get("prog_name") or PROGRAM
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **options)
        with standard_streams.prepared_streams():
            streams = sys.stdout, sys.stderr
            try:
                code = _run_and_report(run, *args, standalone_mode=False, **options)
            finally:
                sys.stdout, sys.stderr = streams  # click replaces them after a broken pipe
                flush_code = _flush_streams()
        sys.exit(flush_code or code)


def _run_and_report(run: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Run the command and report its error, if any -> the exit code."""
    try:
        code = _run_command(run, *args, **options)
    except click.exceptions.NoArgsIsHelpError as error:
        standard_streams.write_stderr(error.format_message())
        return EXIT_ERROR
    except click.ClickException as error:
        return fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit as end:  # click's, after a broken pipe
        return end.code if isinstance(end.code, int) else EXIT_ERROR
    except Exception as error:
        if not is_expected(error):
            raise
        if isinstance(error, OSError) and (code := _flush_streams()):
            return code
        return fail(standard_streams.one_line(error))
    return code if isinstance(code, int) else 0


def _run_command(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run the command, then shut down its workers. A launcher's ranks above 0 run as workers and print nothing."""
    if _is_worker():
        return _run_as_worker(run, *args, **options)
    code = run(*args, **options)
    if "fastllama.distributed.driver" in sys.modules:
        from fastllama.distributed import driver

        driver.shut_down()
    return code


def _is_worker() -> bool:
    try:
        launch = environment.distributed_environment()
    except ValueError:  # commands that build a model report it
        return False
    return launch is not None and launch.rank > 0


def _run_as_worker(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run the command silently until it raises RunAsWorker, then run as a worker. Rank 0 prints output and errors."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run(*args, **options)
    except RunAsWorker:
        from fastllama.distributed import worker

        return worker.run_worker()
    except click.ClickException:
        return EXIT_ERROR


def _flush_streams() -> int:
    """Flush stdout and stderr, and report an error of stdout -> the exit code, 0 without an error."""
    stdout_error, _ = (standard_streams.flush_or_discard(stream) for stream in (sys.stdout, sys.stderr))
    if stdout_error is None:
        return 0
    if isinstance(stdout_error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    return fail(f"{standard_streams.STDOUT_ERROR}{stdout_error.strerror or stdout_error}")


def fail(message: str) -> int:
    """Report `message` in one line on stderr -> the exit code."""
    standard_streams.write_stderr(f"{PROGRAM}: error: {' '.join(message.split())}")
    return EXIT_ERROR


def is_expected(error: Exception) -> bool:
    """Whether the input or the machine can cause `error`; any other is a bug in the program."""
    if isinstance(error, ValueError | AssertionError | OSError | MemoryError):
        return True
    parallel = sys.modules.get("fastllama.distributed.model_parallel")
    if parallel is not None and isinstance(error, parallel.ProcessFailed):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # torch reports a CPU out of memory, and a missing device, as a plain RuntimeError.
    memory_plan = sys.modules.get("fastllama.memory_plan")
    words = memory_plan.OUT_OF_MEMORY_WORDS if memory_plan is not None and isinstance(error, RuntimeError) else ()
    if isinstance(error, ImportError):
        words = LOADER_OUT_OF_MEMORY_WORDS
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
        # Meta's options have underscores; hyphens work, too.
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "max_content_width": 100,
    },
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def program() -> None:
    """Run Llama 3 models: complete text, chat, answer files of requests, and look at, quantise and measure checkpoints.

    Without a checkpoint the small model in the package is used.

    \b
    Examples:
      fastllama complete "Once upon a time"
      fastllama chat --ckpt_dir Meta-Llama-3-8B-Instruct
    """


for command in (complete, chat, serve, batch, inspect, quantize, quality, bench):
    program.add_command(command)
