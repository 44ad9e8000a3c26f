"""The number of threads: the caller's setting, the CPUs, OpenMP's limits and the amount of work."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastllama import ModelArgs, Transformer, threads
from tests.support.checkpoints import tiny_params
from tests.support.tiers import parameters

ROOT = Path(__file__).resolve().parents[2]
# Compares a model's logits on four threads with those on one, for prefill and decode, in three dtypes.
PRODUCTS = """
import json, torch
from fastllama import ModelArgs, Transformer, threads
threads.SMALL_WORK = 0
args = ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=4096, max_seq_len=64, max_batch_size=2)
differences = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = []
    for count in (4, 1):
        with threads.use_exactly(count):
            torch.manual_seed(0)
            model = Transformer(args, device="cpu", dtype=dtype)
            logits.append([model.forward(torch.arange(20)[None], 0), model.forward(torch.tensor([[5]]), 20)])
    differences[str(dtype)] = max(float((a - b).abs().max().nan_to_num(1e9)) for a, b in zip(*logits))
print(json.dumps(differences))
"""
TOLERANCES = {"torch.float32": 1e-4, "torch.bfloat16": 0.1, "torch.float16": 0.05}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads and two CPUs, on any machine."""
    monkeypatch.setattr(threads._openmp, "cpus", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def set_limits(monkeypatch: pytest.MonkeyPatch, *, cpus: int, quota: float | None) -> None:
    monkeypatch.setattr(threads._openmp, "cpus", lambda: cpus)
    monkeypatch.setattr(threads, "_quota", lambda: quota)


@pytest.mark.parametrize(
    ("configured", "cpus", "quota", "expected"),
    [
        (8, 8, None, 8),
        (8, 3, None, 3),
        (2, 8, None, 2),
        (8, 8, 1.5, 2),
        (8, 8, 0.25, 1),
        (8, 2, 4.0, 2),
        (1, 4, 2.0, 1),
    ],
)
def test_threads_are_limited_by_cpus_and_quota(
    monkeypatch: pytest.MonkeyPatch, configured: int, cpus: int, quota: float | None, expected: int
) -> None:
    set_limits(monkeypatch, cpus=cpus, quota=quota)
    torch.set_num_threads(configured)
    assert threads.available() == expected
    with threads.limited():
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == configured


def test_use_exactly_overrides_limits_and_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, cpus=1, quota=0.5)
    with threads.use_exactly(3):
        assert threads.available() == torch.get_num_threads() == 3
        with threads.limited(), threads.for_work(1, 1):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 2 and threads.available() == 1


@pytest.mark.parametrize(
    ("work", "weights", "expected"),
    [
        (1, 1, 1),
        (threads.SMALL_WORK, threads.SMALL_WEIGHT_BYTES, 1),
        (threads.SMALL_WORK + 1, 1, 2),
        (1, threads.SMALL_WEIGHT_BYTES + 1, 2),
    ],
)
def test_small_work_is_not_split(work: int, weights: int, expected: int) -> None:
    with threads.limited(), threads.for_work(work, weights):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_a_model_uses_one_thread_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(ModelArgs(max_batch_size=2, max_seq_len=64, **tiny_params()), device="cpu")
    seen: list[int] = []
    head = model.ops.norm_lm_head

    def watched(*given: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        logits: torch.Tensor = head(*given)
        return logits

    monkeypatch.setattr(model.ops, "norm_lm_head", watched)
    model.forward(torch.tensor([[1, 2]]), 0)
    monkeypatch.setattr(threads, "SMALL_WORK", 0)
    model.forward(torch.tensor([[1, 2]]), 0)
    assert seen == [1, 2] and torch.get_num_threads() == 2


def test_only_the_calling_thread_is_changed() -> None:
    seen: list[int] = []
    with threads.limited(), threads.for_work(1, 1):
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [2]


def test_dynamic_threads_are_turned_off() -> None:
    if not threads._openmp.is_known:
        pytest.skip("this torch has no OpenMP runtime that can be configured")
    threads._openmp.set_dynamic(True)
    try:
        with threads.limited():
            assert not threads._openmp.dynamic() and torch.get_num_threads() == 2
        assert threads._openmp.dynamic()
    finally:
        threads._openmp.set_dynamic(False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"thread_limit": lambda: 1}, 1),
        ({"max_active_levels": lambda: 0}, 1),
        ({"is_known": False}, 1),  # and OMP_DYNAMIC is set
    ],
    ids=["limit", "levels", "dynamic"],
)
def test_threads_that_openmp_does_not_start_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], expected: int
) -> None:
    threads._warn.cache_clear()
    for name in [name for name in os.environ if name.startswith(threads.LIMITING_PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    for name, value in changes.items():
        monkeypatch.setattr(threads._openmp, name, value)
    with caplog.at_level(logging.WARNING):
        assert threads.available() == threads.available() == expected
    assert caplog.messages == ["computing on 1 of 2 threads: OpenMP gives no more (OMP_DYNAMIC=TRUE)"]


def test_incomplete_products_are_computed_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads._products_are_complete.cache_clear()

    def losing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.T).index_fill_(1, torch.tensor([weight.shape[0] - 1]), 0)

    monkeypatch.setattr(threads, "F", SimpleNamespace(linear=losing))
    try:
        assert threads.available() == 1
    finally:
        threads._products_are_complete.cache_clear()
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert threads.available() == min(2, threads.cpus())


@pytest.mark.parametrize(
    "environment",
    parameters(
        {
            "OMP_THREAD_LIMIT": {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true"},
            "OMP_MAX_ACTIVE_LEVELS": {"OMP_MAX_ACTIVE_LEVELS": "0", "OMP_NUM_THREADS": "3"},
        },
        quick=("OMP_MAX_ACTIVE_LEVELS",),
    ),
)
def test_products_are_right_under_openmps_limits(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {dtype: found[dtype] < limit for dtype, limit in TOLERANCES.items()} == dict.fromkeys(TOLERANCES, True), (
        found
    )
    assert next(iter(environment)) in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other OpenMP runtimes than GNU's let their threads sleep")
def test_openmps_threads_end_and_start_again() -> None:
    code = """
import time, psutil, torch
from fastllama import threads
count = psutil.Process().num_threads
x = torch.randn(512, 512)
with threads.use_exactly(2):
    product = x @ x
    started = count()
    threads.end_openmp_threads()
    deadline = time.monotonic() + 60
    while count() >= started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count() < started, (count(), started)
    assert torch.equal(x @ x, product)
    assert count() == started
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
