"""The process of our own server, for the peers `serve` and `serve-whole`."""

import sys
from contextlib import ExitStack
from typing import Any

from fastllama.benchmarks.child_process import answer_requests
from fastllama.benchmarks.models import ModelSpec
from fastllama.distributed.shared_engine import open_engine
from fastllama.engine.engine import Engine

HOST = "127.0.0.1"
NAME = "measured"  # of the model


def main() -> int:
    """Serve the model of the first request, whose reply has the port. Later ones ask for an empty cache."""
    engine: Engine | None = None
    before, stack = [0, 0], ExitStack()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal engine, before
        if engine is None:
            engine, port = _serve(ModelSpec.from_json(**request["model"]), stack)
            return {"port": port}
        counts = [engine.stats.cached_tokens, engine.stats.preemptions]
        since = [now - then for now, then in zip(counts, before, strict=True)]
        before = counts
        engine.llm.model.cache.pool.forget()  # nothing runs between two workloads
        return {"cached_tokens": since[0], "preemptions": since[1]}

    with stack:
        return answer_requests(answer)


def _serve(spec: ModelSpec, stack: ExitStack) -> tuple[Engine, int]:
    """The engine behind a server that listens, and its port. `stack` ends the server."""
    from fastllama.openai_api.envelope import ServedModel
    from fastllama.server.http_process import HttpProcess
    from fastllama.server.run import bind
    from fastllama.server.settings import ServerSettings

    llm = spec.build()
    llm.decoder.capture_graphs(list(range(1, spec.max_batch_size + 1)))
    engine = open_engine(llm).start()
    listener = bind(HOST, 0)
    port = listener.getsockname()[1]
    stack.enter_context(HttpProcess(listener)).begin(engine, ServedModel(NAME, llm.tokenizer), ServerSettings())
    return engine, port


if __name__ == "__main__":
    sys.exit(main())
