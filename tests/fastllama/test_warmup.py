"""Warm-up: build compiles every kernel that a call of any size launches, and shows a progress bar."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama, warmup
from fastllama.benchmarks.kernels_report.ahead_of_time import compiling_environment
from fastllama.benchmarks.kernels_report.report import CACHE
from fastllama.decode_graph import Decoder
from tests.support.tiny import MAX_BATCH_SIZE, tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The output of `tests.fastllama.warmup_compilations`, from a process in which kernels are compiled."""
    command = [sys.executable, "-m", "tests.fastllama.warmup_compilations"]
    environment = compiling_environment(str(CACHE))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(600)  # about forty compilations, if none is cached
def test_calls_compile_no_kernel_that_build_has_not(compiled: dict[str, Any]) -> None:
    """Calls of one model with many numbers of rows and prompt lengths."""
    assert compiled["later"] == {}, "kernels that a call compiled, with its prompt lengths"
    assert compiled["calls"] > 40 and compiled["kernels"] == 10


def test_row_classes_end_at_the_most_rows() -> None:
    assert warmup.row_classes(1) == [1]
    assert warmup.row_classes(2, [1, 2]) == [1, 2]
    assert warmup.row_classes(4, [4]) == [1, 3, 4]
    assert warmup.row_classes(40, [40, 12]) == [1, 3, 9, 12, 17, 33, 40]
    assert warmup.row_classes(128) == [1, 3, 9, 17, 33, 65, 128]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_backend_with_kernels_does_dry_runs_and_shows_a_bar(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(llm.model.ops, "supports_cuda_graphs", lambda device: True)
    monkeypatch.setattr(Decoder, "dry_run", lambda self, rows: done.append(rows))
    monkeypatch.setattr(Decoder, "capture_graphs", lambda self, sizes: done.append(list(sizes)))
    monkeypatch.setattr(warmup, "prefill", lambda model, prompts, guesser: done.append([*map(len, prompts)]))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    expected = [1, 3, MAX_BATCH_SIZE, [2], [12], [40], [1, MAX_BATCH_SIZE]]
    warmup.warm_up(llm.decoder, [1, MAX_BATCH_SIZE])
    assert done == expected
    assert "preparing kernels and graphs: 100%" in capsys.readouterr().err
    done.clear()
    warmup.warm_up(llm.decoder, [1, MAX_BATCH_SIZE], progress=False)
    assert done == expected and capsys.readouterr().err == ""


def test_a_backend_without_kernels_prepares_nothing(llm: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    before = llm.model.cache.k.clone()
    warmup.warm_up(llm.decoder, [1])
    assert llm.model.cache.k.equal(before) and capsys.readouterr().err == ""


def test_a_dry_run_does_not_affect_the_next_call(llm: Llama) -> None:
    expected = llm.generate([[5, 6, 7]], 4, temperature=0)
    llm.decoder.dry_run(MAX_BATCH_SIZE)
    assert llm.generate([[5, 6, 7]], 4, temperature=0) == expected
