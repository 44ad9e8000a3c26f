"""Memory in large pages: where tensors are placed, and when their memory is given back."""

import gc
import mmap
import threading
import weakref

import pytest
import torch
from torch import Tensor

from fastllama.kernels.native import memory
from fastllama.kernels.native.memory import ALIGNMENT, BLOCK_BYTES, LARGE_PAGE, MAX_SHARED_BYTES, Blocks, allocate

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> "list[weakref.ref[mmap.mmap]]":
    """The blocks that are mapped during a test; a dead reference is one that was unmapped."""
    blocks = []
    original = memory._map

    def recorded(n_bytes: int) -> tuple[mmap.mmap, int]:
        block, offset = original(n_bytes)
        blocks.append(weakref.ref(block))
        return block, offset

    monkeypatch.setattr(memory, "_map", recorded)
    return blocks


@pytest.mark.parametrize("shape", [(3,), (5, 7), (1000, 1000), (3000, 1000), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_contiguous_and_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [allocate(shape, dtype, CPU) for _ in range(3)]
    for index, tensor in enumerate(tensors):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))


def test_small_tensors_share_a_block_that_begins_at_a_large_page() -> None:
    blocks = Blocks()
    first, second = blocks.take(100), blocks.take(LARGE_PAGE)
    assert first.data_ptr() % LARGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + 128


def test_a_block_is_unmapped_with_the_last_of_its_tensors(mapped: "list[weakref.ref[mmap.mmap]]") -> None:
    blocks = Blocks()
    tensors = [blocks.take(MAX_SHARED_BYTES) for _ in range(BLOCK_BYTES // MAX_SHARED_BYTES + 1)]
    assert [block() is not None for block in mapped] == [True, True]
    del tensors[:-2]
    gc.collect()
    assert mapped[0]() is not None
    del tensors[0]
    gc.collect()
    assert [block() is not None for block in mapped] == [False, True]
    tensors.clear()
    gc.collect()
    assert mapped[1]() is None
    assert not blocks.take(1).any()


def test_a_large_tensor_is_unmapped_whatever_was_allocated_after_it(mapped: "list[weakref.ref[mmap.mmap]]") -> None:
    blocks = Blocks()
    small, large = blocks.take(10), blocks.take(MAX_SHARED_BYTES + 1)
    later = blocks.take(10)
    assert large.data_ptr() % LARGE_PAGE == 0
    assert later.data_ptr() == small.data_ptr() + ALIGNMENT
    del large
    gc.collect()
    assert [block() is not None for block in mapped] == [True, False]


def test_large_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Recorded(mmap.mmap):
        def madvise(self, option: int) -> None:  # type: ignore[override]
            asked.append(option)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    Blocks().take(100)
    assert asked == [mmap.MADV_HUGEPAGE]


def test_a_system_without_large_pages_has_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 10**6)  # advice that no system takes
    assert not Blocks().take(100).any()


def test_torch_allocates_where_the_system_maps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(n_bytes: int) -> tuple[mmap.mmap, int]:
        raise OSError("no memory")

    monkeypatch.setattr(memory, "_map", refused)
    assert allocate((3, 2**22), torch.float32, CPU).shape == (3, 2**22)


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
