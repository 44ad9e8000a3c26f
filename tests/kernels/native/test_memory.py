"""Memory in large pages: where tensors are placed, and when their memory is given back."""

import gc
import mmap
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllama.kernels.native.memory import ALIGNMENT, BLOCK_BYTES, LARGE_PAGE, Blocks, allocate

CPU = torch.device("cpu")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")


def mapping(tensor: Tensor) -> dict[str, int]:
    """The figures in /proc/self/smaps, in KiB, of the mapping that holds a tensor."""
    address = tensor.data_ptr()
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part)
        if bounds and int(bounds[1], 16) <= address < int(bounds[2], 16):
            return {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", part)}
    return {}


@pytest.mark.parametrize("shape", [(3,), (5, 7), (1000, 1000), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_contiguous_and_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [allocate(shape, dtype, CPU) for _ in range(3)]
    for index, tensor in enumerate(tensors):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))


def test_tensors_share_blocks_that_begin_at_a_large_page() -> None:
    blocks = Blocks()
    first, second = blocks.take(100), blocks.take(LARGE_PAGE)
    assert first.data_ptr() % LARGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + 128
    third = blocks.take(BLOCK_BYTES)  # larger than what is left
    assert third.data_ptr() % LARGE_PAGE == 0
    assert blocks.take(10).data_ptr() == third.data_ptr() + BLOCK_BYTES


def test_a_block_is_unmapped_with_its_last_tensor() -> None:
    blocks = Blocks()
    first, second = blocks.take(3 * BLOCK_BYTES), blocks.take(100)
    address = second.data_ptr()
    del first
    gc.collect()
    assert is_mapped(address)
    del second
    gc.collect()
    assert not is_mapped(address)
    assert not blocks.take(1).any()


def is_mapped(address: int) -> bool:
    ranges = re.findall(r"(?m)^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_untouched_memory_costs_nothing() -> None:
    tensor = Blocks().take(1000)
    tensor.fill_(1)
    assert mapping(tensor)["Rss"] <= LARGE_PAGE // 1024


@pytest.mark.skipif(not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="large pages are turned off")
def test_written_memory_is_in_large_pages() -> None:
    tensor = Blocks().take(8 * LARGE_PAGE)
    tensor.fill_(1)
    assert mapping(tensor)["AnonHugePages"] > 0


def test_threads_get_memory_of_their_own() -> None:
    blocks = Blocks()
    taken: list[Tensor] = []

    def take(value: int) -> None:
        for _ in range(200):
            tensor = blocks.take(1000)
            tensor.fill_(value)
            taken.append(tensor)

    workers = [threading.Thread(target=take, args=(value,)) for value in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({tensor.data_ptr() for tensor in taken}) == 800
    assert all((tensor == tensor[0]).all() for tensor in taken)
