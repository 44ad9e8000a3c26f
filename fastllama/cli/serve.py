"""`fastllama serve`: OpenAI's API over HTTP, and a page to chat in."""

import ipaddress
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastllama.cli.batch import BUILTIN_NAME, DEFAULT_ROWS
from fastllama.cli.options import ModelOptions, cache_tokens_option, connect_processes, model_options
from fastllama.cli.standard_streams import write_stderr, write_stdout

if TYPE_CHECKING:
    from fastllama.server.settings import ServerSettings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DEFAULT_MAX_SEQ_LEN = 4096
API_KEY_VARIABLE = "FASTLLAMA_API_KEY"


@click.command()
@model_options(DEFAULT_MAX_SEQ_LEN)
@click.option("--host", default=DEFAULT_HOST, show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: a free one.")
@click.option(
    "--api_key",
    "api_keys",
    multiple=True,
    envvar=API_KEY_VARIABLE,
    metavar="KEY",
    help=f"Key that clients must send; may be repeated. Better in the variable {API_KEY_VARIABLE}, which others cannot "
    "see. Needed for any address but this machine's own.",
)
@click.option(
    "--served_model_name", metavar="NAME", help="Name of the model. Default: that of the checkpoint's folder."
)
@click.option("--max_batch_size", type=click.IntRange(min=1), help="Answers at a time. Default: 16, 64 on a GPU.")
@cache_tokens_option
@click.option("--max_prompt_tokens", type=click.IntRange(min=1), help="Of each prompt. Default: what fits.")
@click.option("--max_queue", type=click.IntRange(min=0), default=256, show_default=True, help="Answers that may wait.")
@click.option(
    "--max_connections", type=click.IntRange(min=1), default=1024, show_default=True, help="Requests in work at once."
)
@click.option(
    "--max_body_mib", type=click.IntRange(min=1), default=8, show_default=True, help="Size of a request's body in MiB."
)
@click.option(
    "--drain_seconds",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Time for answers to end after SIGTERM or Ctrl-C.",
)
@click.option("--allow_origin", "allow_origins", multiple=True, metavar="URL", help="Web pages that may use it.")
@click.option("--root_path", default="", help="Prefix of all paths, where a proxy in front removes it.")
@click.option("--access_log", is_flag=True, help="Print a line for every request.")
@click.option("--json", "as_json", is_flag=True, help="Print one object with the address once it listens.")
def serve(**options: Any) -> None:
    """Serve a model to OpenAI's clients, and a page to chat in.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /tokenize and /detokenize; GET /v1/models, /health,
    /metrics (for Prometheus), /openapi.json, and / (the page). SIGTERM or Ctrl-C ends it when the answers that run
    have ended; a second one at once; a third one without waiting for a step.

    \b
    Examples:
      fastllama serve
      fastllama serve --ckpt_dir Meta-Llama-3-8B-Instruct --max_batch_size 64 --cache_tokens 131072
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """
    connect_processes(options["nproc"])
    model = ModelOptions.pop_from(options)
    _check_address(options["host"], options["api_keys"])
    try:
        from fastllama.server import run
    except ImportError as error:
        raise click.UsageError(f"the server needs more packages ({error}): pip install 'fastllama[serve]'") from error
    from fastllama.distributed.shared_engine import open_engine
    from fastllama.loading import choose_device
    from fastllama.openai_api.envelope import ServedModel
    from fastllama.server.fingerprint import fingerprint
    from fastllama.server.http_process import HttpProcess

    listener = run.bind(options["host"], options["port"])  # before the model is loaded, which may take minutes
    url = f"http://{_in_url(options['host'])}:{listener.getsockname()[1]}"
    rows = options["max_batch_size"] or DEFAULT_ROWS[choose_device(model.device).type]
    with ExitStack() as stack:
        http = stack.enter_context(HttpProcess(listener))
        llm = model.build(rows, quiet=options["as_json"], cache_tokens=options["cache_tokens"])
        name = options["served_model_name"] or _model_name(model.ckpt_dir)
        engine = stack.enter_context(open_engine(llm)).start()
        http.begin(
            engine,
            ServedModel(name, llm.tokenizer, fingerprint(llm)),
            _settings(options),
            root_path=options["root_path"].rstrip("/"),
            log_level="info" if options["access_log"] else "warning",
        )
        http.wait(lambda: _announce(name, url, options["as_json"]))


def _settings(options: dict[str, Any]) -> "ServerSettings":
    from fastllama.server.settings import MEBIBYTE, ServerSettings

    return ServerSettings(
        api_keys=options["api_keys"],
        max_body_bytes=options["max_body_mib"] * MEBIBYTE,
        max_prompt_tokens=options["max_prompt_tokens"],
        max_queue=options["max_queue"],
        max_connections=options["max_connections"],
        drain_seconds=options["drain_seconds"],
        allow_origins=options["allow_origins"],
    )


def _check_address(host: str, api_keys: tuple[str, ...]) -> None:
    """Raise UsageError for an address that others reach, without a key; and for a key that no header can hold."""
    for key in api_keys:
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise click.UsageError("--api_key must be printable ASCII characters without spaces around them.")
    if api_keys or host == "localhost":
        return
    try:
        is_own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = False
    if not is_own:
        raise click.UsageError(
            f"--host {host} can be reached by others: give them a key with --api_key, or in {API_KEY_VARIABLE}."
        )


def _model_name(ckpt_dir: str | None) -> str:
    return BUILTIN_NAME if ckpt_dir is None else Path(ckpt_dir).resolve().name


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _announce(name: str, url: str, as_json: bool) -> None:
    if as_json:
        write_stdout(json.dumps({"model": name, "url": url, "pid": os.getpid()}))
    else:
        write_stderr(f"{name} at {url} (OpenAI's API under {url}/v1); Ctrl-C stops it")
