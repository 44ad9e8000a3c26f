"""The kernels that measure a GPU do what they are timed for."""

import torch

from fastllama.benchmarks.gpu_report.probes import READ_BLOCK, read, tick


def test_read_looks_at_every_number(device: torch.device) -> None:
    source = torch.arange(2 * READ_BLOCK, device=device).remainder(7).half()
    assert torch.equal(read(source), source.float().view(2, -1).sum(-1))


def test_tick_counts(device: torch.device) -> None:
    count = torch.zeros(1, dtype=torch.int32, device=device)
    for _ in range(5):
        tick(count)
    assert count.tolist() == [5]
