"""Other implementations on identical weights: started, asked, compared, never trusted blindly.

A peer is optional and is skipped by name where it is absent. Its outputs are compared with ours before anything is
timed: a speed is worth nothing when the two do not compute the same thing, so where they disagree that is what the
report says instead of a time.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

import fastllama
from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSource
from fastllama.benchmarks.peers import gpt_fast as gpt_fast_peer
from fastllama.benchmarks.peers import meta
from fastllama.benchmarks.runner import Run
from fastllama.distributed.environment import single_process_environ
from fastllama.distributed.worker_processes import exit_hooks


class Kind(NamedTuple):
    """One that can be compared with."""

    module: str  # of its process
    packages: tuple[str, ...]  # that it needs
    refusal: Callable[[ModelArgs], str | None] = lambda args: None  # why it cannot run a model
    takes_ragged: bool = True  # prompts of different lengths


PEERS = {
    "reference": Kind("fastllama.benchmarks.peers.meta", ("llama_models", "fairscale"), refusal=meta.refusal),
    "transformers": Kind("fastllama.benchmarks.peers.huggingface", ("transformers",)),
    "transformers-compiled": Kind("fastllama.benchmarks.peers.huggingface", ("transformers",)),
    "torch-compile": Kind("fastllama.benchmarks.peers.torch_compile", ()),
    "gpt-fast": Kind(
        "fastllama.benchmarks.peers.gpt_fast",
        ("sentencepiece", "tiktoken"),
        refusal=gpt_fast_peer.refusal,
        takes_ragged=False,
    ),
}
CLOSE_TIMEOUT_S = 10
MAX_REASON = 300  # characters


class PeerError(Exception):
    """A peer could not be started or broke down; the message says why in one line."""


def absence(name: str, args: ModelArgs, gpt_fast: str | None = None) -> str | None:
    """Why the peer called `name` cannot run this model here, or None when it can. ValueError for no peer's name.

    gpt_fast: the folder of gpt-fast's code.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: expected one of {', '.join(PEERS)}")
    if name == "gpt-fast" and (reason := gpt_fast_peer.missing(gpt_fast)) is not None:
        return reason
    packages = PEERS[name].packages
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    if lacking:
        wanted = " ".join(package.replace("_", "-") for package in packages)
        return f"{' and '.join(lacking)} not installed: pip install {wanted}"
    return PEERS[name].refusal(args)


def one_line(error: object) -> str:
    """What an error says, without line breaks and, where it goes on for pages, cut."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


class Peer:
    """A peer in a process of its own. A context manager; leaving it ends the process."""

    def __init__(
        self,
        name: str,
        source: ModelSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        max_seq_len: int,
        gpt_fast: str | None = None,
    ) -> None:
        """Start the process and load the weights. PeerError with the reason where that fails."""
        self._folder = tempfile.TemporaryDirectory(prefix="fastllama-peer-")
        self._log = Path(self._folder.name, "stderr.txt")
        self._error: str | None = None  # the first that there was
        root = str(Path(fastllama.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PEERS[name].module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env={**single_process_environ(), "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for us: we end the peer once what was measured is safe
            )
        exit_hooks.append(self.close)
        try:
            self._ask(
                {
                    "name": name,
                    "folder": self._folder.name,
                    "source": source.to_json(),
                    "device": str(device),
                    "dtype": str(dtype).removeprefix("torch."),
                    "max_batch_size": max_batch_size,
                    "max_seq_len": max_seq_len,
                    "threads": torch.get_num_threads(),
                    "gpt_fast": gpt_fast,
                }
            )
        except BaseException:
            self.close()
            raise

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        """`steps` greedy tokens for each of the `prompts`. PeerError when the peer fails, and again ever after."""
        return Run(**self._ask({"prompts": prompts, "steps": steps, "logprobs": logprobs}))

    def close(self) -> None:
        """End the process. Safe to call twice."""
        if self.close in exit_hooks:
            exit_hooks.remove(self.close)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(CLOSE_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._error is not None:
            raise PeerError(self._error)
        try:
            return self._exchange(request)
        except PeerError as error:
            self._error = str(error)
            raise

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise PeerError("the peer has no pipes")
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            raise PeerError(f"the peer's process ended: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(one_line(reply["error"]))
        return reply

    def _last_words(self) -> str:
        if not self._log.exists():
            return "it was closed"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


@contextlib.contextmanager
def running(
    names: Sequence[str],
    source: ModelSource,
    args: ModelArgs,
    progress: Callable[[str], None],
    *,
    device: torch.device,
    dtype: torch.dtype,
    gpt_fast: str | None,
) -> Iterator[dict[str, Peer | PeerError | str]]:
    """The peers of these names, or the reason why one is not there. args: the model's, with the sizes of its cache."""
    peers: dict[str, Peer | PeerError | str] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            reason = absence(name, args, gpt_fast)
            if reason is not None:
                peers[name] = reason
                continue
            progress(f"starting {name}")
            sizes = {"max_batch_size": args.max_batch_size, "max_seq_len": args.max_seq_len}
            try:
                peer = Peer(name, source, device=device, dtype=dtype, gpt_fast=gpt_fast, **sizes)
                peers[name] = stack.enter_context(peer)
            except PeerError as error:
                peers[name] = error
        yield peers
