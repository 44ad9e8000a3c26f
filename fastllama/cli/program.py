"""The program `fastllama`: its commands, and how every one of them fails."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from fastllama.cli.bench import bench
from fastllama.cli.chat import chat
from fastllama.cli.complete import complete
from fastllama.cli.inspect import inspect
from fastllama.cli.options import under_torchrun

PROGRAM = "fastllama"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class Program(click.Group):
    """A group that turns what went wrong into one line on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """As click's, whose own handling of errors and exit codes this replaces in standalone mode.

        A reader that went away (`| head`) is left to click, which ends quietly.
        """
        options["prog_name"] = options.get("prog_name") or PROGRAM
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **options)
        try:
            code = _shared(run, *args, standalone_mode=False, **options)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_ERROR)
        except click.ClickException as error:
            fail(error.format_message())
        except (click.Abort, KeyboardInterrupt):
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if not is_expected(error):
                raise
            fail(str(error) or type(error).__name__)
        sys.exit(code if isinstance(code, int) else 0)


def _shared(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run in one process. Of those that torchrun started it is the first; the others follow it, whatever it builds."""
    together = under_torchrun()
    if together and os.environ["RANK"] != "0":
        from fastllama import follower

        return follower.follow()
    code = run(*args, **options)
    if together or "fastllama.leader" in sys.modules:
        from fastllama import leader

        leader.dismiss()
    return code


def fail(message: str) -> NoReturn:
    """Say `message` in one line on stderr and exit."""
    click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_ERROR)


def is_expected(error: Exception) -> bool:
    """Whether `error` is one that the input or the machine causes, rather than a fault in the program."""
    if isinstance(error, ValueError | AssertionError | OSError | MemoryError):
        return True
    # torch reports a CPU that is out of memory, and a device that is not there, as a bare RuntimeError.
    parallel = sys.modules.get("fastllama.parallel")
    if parallel is not None and isinstance(error, parallel.ProcessFailed):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


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
