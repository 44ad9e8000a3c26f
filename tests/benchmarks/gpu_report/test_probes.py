"""The kernels that measure a GPU."""

import torch

from fastllama.benchmarks.gpu_report.probes import READ_BLOCK, block_sums, increment


def test_block_sums_reads_every_number(device: torch.device) -> None:
    source = torch.arange(2 * READ_BLOCK, device=device).remainder(7).half()
    assert torch.equal(block_sums(source), source.float().view(2, -1).sum(-1))


def test_increment_counts(device: torch.device) -> None:
    count = torch.zeros(1, dtype=torch.int32, device=device)
    for _ in range(5):
        increment(count)
    assert count.tolist() == [5]
