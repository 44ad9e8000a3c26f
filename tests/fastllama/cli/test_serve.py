"""`fastllama serve` as a process: its address, its errors, and how it stops."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.command_line import expect_error, run
from tests.support.server_process import serving
from tests.support.timeouts import HANG_SECONDS

# More tokens than are generated before the signal arrives, on any machine.
LONG = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "stream": True, "temperature": 0}
OPTIONS = ("--max_batch_size", "2", "--max_seq_len", "8192")


def test_a_signal_lets_what_runs_end_and_refuses_the_rest() -> None:
    patient = str(HANG_SECONDS)
    with (
        serving(*OPTIONS, "--drain_seconds", patient) as (server, process),
        httpx.Client(base_url=server["url"], timeout=HANG_SECONDS) as client,
    ):
        assert server["model"] == "builtin" and server["pid"] == process.pid
        assert client.get("/health").json() == {"status": "ok"}
        with client.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 1500}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while (refused := client.get("/health")).status_code == 200:  # until the signal has been handled
                pass
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert json.loads(rest[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(HANG_SECONDS) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_what_runs_for_too_long_is_cut() -> None:
    with (
        serving(*OPTIONS, "--drain_seconds", "0") as (server, process),
        httpx.Client(base_url=server["url"], timeout=HANG_SECONDS) as client,
    ):
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        error = json.loads(rest[-4].removeprefix("data: "))["error"]
        assert error["code"] == "stopping" and "before the answer was complete" in error["message"]
        assert process.wait(HANG_SECONDS) == 0


def test_two_processes_serve_until_one_dies() -> None:
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    with (
        serving(*OPTIONS, "--nproc", "2") as (server, process),
        httpx.Client(base_url=server["url"], timeout=HANG_SECONDS) as client,
    ):
        answer = client.post("/v1/chat/completions", json=question).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        children = psutil.Process(process.pid).children()
        (worker,) = (one for one in children if "fastllama.distributed.worker" in one.cmdline())
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            worker.kill()
            rest = list(lines)
        assert json.loads(rest[-4].removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert process.wait(HANG_SECONDS) == 2
        assert process.stderr is not None and "process 1 of 2 was killed by signal 9" in process.stderr.read()


def http_process(process: "subprocess.Popen[str]") -> psutil.Process:
    """The process that serves HTTP for a server's process."""
    children = psutil.Process(process.pid).children()
    (found,) = (one for one in children if "spawn_main" in " ".join(one.cmdline()))
    return found


def test_ctrl_c_in_a_terminal_stops_in_order() -> None:
    """It reaches both processes."""
    with (
        serving(*OPTIONS) as (server, process),
        httpx.Client(base_url=server["url"], timeout=HANG_SECONDS) as client,
        client.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 1000}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        for one in (http_process(process), process):
            one.send_signal(signal.SIGINT)
        assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(HANG_SECONDS) == 0
        assert process.stderr is not None and process.stderr.read() == ""


@pytest.mark.slow
def test_a_second_signal_stops_at_once() -> None:
    with (
        serving(*OPTIONS, "--drain_seconds", str(HANG_SECONDS)) as (server, process),
        httpx.Client(base_url=server["url"], timeout=HANG_SECONDS) as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code == 200:  # until the signal has been handled
            pass
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            list(lines)
        assert process.wait(HANG_SECONDS) == 0


@pytest.mark.slow
def test_three_signals_end_a_process_that_does_not_answer() -> None:
    with serving(*OPTIONS) as (_, process):
        http_process(process).suspend()
        for _number in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)  # signals that come together are one
        assert process.wait(HANG_SECONDS) == 130


def test_the_server_ends_with_its_process_for_http() -> None:
    with serving(*OPTIONS) as (_, process):
        http_process(process).kill()
        assert process.wait(HANG_SECONDS) == 2
        assert process.stderr is not None
        assert "the process that serves HTTP has ended (exit code -9)" in process.stderr.read()


@pytest.mark.slow
def test_the_process_for_http_ends_with_the_server() -> None:
    with serving(*OPTIONS) as (server, process):
        left = http_process(process)
        process.kill()
        assert left.wait(HANG_SECONDS) is None
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server['url']}/health")
        assert process.stderr is not None and "the engine's process has ended" in process.stderr.read()


def test_the_process_for_http_ends_where_no_model_can_be_loaded(tmp_path: Path) -> None:
    expect_error(run("serve", "--port", "0", "--ckpt_dir", str(tmp_path)), str(tmp_path))  # waits for both processes


def test_keys_come_from_the_environment() -> None:
    with serving(*OPTIONS, FASTLLAMA_API_KEY="one two") as (server, _):
        for key, status in (("one", 200), ("two", 200), ("one two", 401), ("three", 401)):
            got = httpx.get(f"{server['url']}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert got.status_code == status, key


def test_another_address_needs_a_key() -> None:
    expect_error(run("serve", "--host", "0.0.0.0"), "--host 0.0.0.0 can be reached by others", "--api_key")
    expect_error(run("serve", "--host", "::"), "can be reached by others")


@pytest.mark.parametrize("key", ["", " a", "a\n", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    expect_error(run("serve", "--api_key", key), "printable ASCII")


def test_a_port_in_use_is_an_error_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expect_error(run("serve", "--port", str(port), "--ckpt_dir", "nowhere"), f"port {port}", "in use")


def test_an_unknown_address_is_an_error() -> None:
    expect_error(run("serve", "--host", "no.such.host.invalid", "--api_key", "k"), "no.such.host.invalid")
