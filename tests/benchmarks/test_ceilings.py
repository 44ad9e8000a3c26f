"""The probes of the machine's ceilings. No test asserts a speed."""

import pytest
import torch

from fastllama.benchmarks import ceilings
from fastllama.benchmarks.ceilings import MatmulProbe, ReadProbe, copy_ceiling
from tests.benchmarks.cases import CPU

SMALL_BUFFER_BYTES = 2**16


def test_ceilings_are_positive_and_describe_the_method() -> None:
    probe = ReadProbe(CPU, SMALL_BUFFER_BYTES)
    first = probe.sample(0.0)
    probe.sample(0.0)
    read = probe.ceiling()
    assert read.samples.count == 2 * first.count
    copied = copy_ceiling(CPU, SMALL_BUFFER_BYTES, seconds=0.0)
    products = MatmulProbe(CPU, torch.float32, size=16)
    products.sample(0.0)
    multiplied = products.ceiling()
    assert [ceiling.unit for ceiling in (read, copied, multiplied)] == ["GB/s", "GB/s", "TFLOP/s"]
    assert all(ceiling.value > 0 for ceiling in (read, copied, multiplied))
    assert ("sum" in read.method or "amax" in read.method) and "float32" in multiplied.method


def test_read_probe_counts_the_bytes_of_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ReadProbe(CPU, SMALL_BUFFER_BYTES)
    monkeypatch.setattr(ceilings, "time_calls", lambda *args, **kwargs: [1e-3, 2e-3, 4e-3])
    assert probe.sample().p50 == pytest.approx(SMALL_BUFFER_BYTES / 2e-3 / 1e9)
