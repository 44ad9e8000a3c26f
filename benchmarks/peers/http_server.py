"""The process of our own server, for the peers `serve` and `serve-whole`."""

import sys
import threading
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
    before = [0, 0]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal engine, before
        if engine is None:
            engine, port = _serve(ModelSpec.from_json(**request["model"]))
            return {"port": port}
        counts = [engine.stats.cached_tokens, engine.stats.preemptions]
        since = [now - then for now, then in zip(counts, before, strict=True)]
        before = counts
        engine.llm.model.cache.pool.forget()  # nothing runs between two workloads
        return {"cached_tokens": since[0], "preemptions": since[1]}

    return answer_requests(answer)


def _serve(spec: ModelSpec) -> tuple[Engine, int]:
    """The engine behind a server that listens, and its port."""
    from fastllama.openai_api.envelope import ServedModel
    from fastllama.server import run
    from fastllama.server.service import Service
    from fastllama.server.settings import ServerSettings

    llm = spec.build()
    llm.decoder.capture_graphs(list(range(1, spec.max_batch_size + 1)))
    engine = open_engine(llm).start()
    service = Service(engine, ServedModel(NAME, llm.tokenizer), ServerSettings())
    listener, listens = run.bind(HOST, 0), threading.Event()
    arguments = {"on_start": listens.set}
    threading.Thread(target=run.serve, args=(service, listener), kwargs=arguments, daemon=True).start()
    listens.wait()
    return engine, listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
