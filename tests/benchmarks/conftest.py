"""A fixture that makes probes fast."""

import pytest

from fastllama.benchmarks import ceilings, timing
from fastllama.benchmarks.ceilings import Probe, ReadProbe, copy_ceiling
from tests.benchmarks.cases import CPU


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ReadProbe:
    """A probe with a small buffer and short samples. All other probes of the test are equally small and short."""
    monkeypatch.setattr(timing, "CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 16)
    monkeypatch.setattr(Probe.sample, "__defaults__", (0.0,))
    monkeypatch.setattr(copy_ceiling, "__defaults__", (None, 0.0))
    return ReadProbe(CPU)
