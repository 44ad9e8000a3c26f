"""The process for HTTP, as the process of the engine sees it."""

import threading
from collections.abc import Iterator

import httpx
import pytest

from fastllama import Engine, Llama
from fastllama.engine.engine_host import EngineHost
from fastllama.openai_api.envelope import ServedModel
from fastllama.server.http_process import HttpProcess
from fastllama.server.run import bind
from fastllama.server.settings import ServerSettings
from tests.fastllama.engine.llamas import engine_llama
from tests.support.running_server import HOST
from tests.support.timeouts import HANG_SECONDS


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return engine_llama(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def engine(llm: Llama) -> Iterator[Engine]:
    with llm.engine().start() as engine:
        yield engine


def test_it_serves_until_the_engine_fails(engine: Engine) -> None:
    """In a program of its own, which does not leave it its main thread."""
    listener = bind(HOST, 0)
    url = f"http://{HOST}:{listener.getsockname()[1]}"
    errors: list[BaseException] = []
    with HttpProcess(listener) as http:
        http.begin(engine, ServedModel("served", engine.llm.tokenizer), ServerSettings())

        def wait() -> None:
            try:
                http.wait()
            except RuntimeError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        body = {"prompt": [5, 6], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=HANG_SECONDS)
        assert len(answer.json()["choices"][0]["token_ids"]) == 3
        assert b"vllm:num_requests_running" in httpx.get(f"{url}/metrics", timeout=HANG_SECONDS).content
        engine.failure = ArithmeticError("as planned")
        waiting.join(HANG_SECONDS)
    assert str(errors[0]) == "the engine cannot go on: as planned"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_process_that_has_ended_before_it_serves_is_an_error(engine: Engine) -> None:
    with HttpProcess(bind(HOST, 0)) as http:
        http._process.kill()
        with pytest.raises(ChildProcessError, match="has ended \\(exit code -9\\)"):
            http.begin(engine, ServedModel("served", engine.llm.tokenizer), ServerSettings())


def test_a_port_that_was_taken_since_is_an_error(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    """Two sockets may have the same address until one of them listens."""
    listener = bind(HOST, 0)
    with bind(HOST, listener.getsockname()[1]) as other:
        other.listen()
        with HttpProcess(listener) as http, pytest.raises(ChildProcessError, match="exit code 1"):
            http.begin(engine, ServedModel("served", engine.llm.tokenizer), ServerSettings())
    assert "cannot listen on port" in capfd.readouterr().err


@pytest.mark.slow
def test_a_connection_that_breaks_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ArithmeticError("as planned")

    monkeypatch.setattr(EngineHost, "_follow", broken)
    with HttpProcess(bind(HOST, 0)) as http, pytest.raises(RuntimeError, match="cannot be talked to"):
        http.begin(engine, ServedModel("served", engine.llm.tokenizer), ServerSettings())


@pytest.mark.slow
def test_nothing_is_waited_for_before_it_serves() -> None:
    with HttpProcess(bind(HOST, 0)) as http, pytest.raises(RuntimeError, match="call begin"):
        http.wait()
    assert not http._process.is_alive()
