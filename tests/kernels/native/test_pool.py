"""The native kernels' threads: results on any number of them, from several callers at once, and after a fork."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastllama.kernels import native
from fastllama.kernels.batch import RaggedBatch
from fastllama.kernels.native import library
from fastllama.kernels.native.graph import NativeGraph
from tests.kernels.cases import random

CPU = torch.device("cpu")
THREADS = 4
DEADLINE_SECONDS = 60


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


class Step:
    """A graph of ops that each need the one before."""

    def __init__(self, seed: int, n_layers: int = 12) -> None:
        self.x = random(3, 64, seed=seed)
        norm, w13, w2 = random(64, seed=seed), random(800, 64, seed=seed), random(64, 400, seed=seed) / 20
        batch = RaggedBatch.of([(0, 0, [0] * 3)], CPU)
        self.out = self.x

        def layers() -> None:
            h = self.x
            for _ in range(n_layers):
                h = native.linear_residual(native.norm_swiglu(h, norm, w13, 1e-5, batch), w2, h, batch)
            self.out = h

        self.graph = NativeGraph()
        self.graph.capture(layers)

    def result(self) -> Tensor:
        self.out.fill_(torch.nan)
        self.graph.replay()
        return self.out.clone()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    step = Step(1)
    torch.set_num_threads(1)
    expected = step.result()
    for count in (2, 3, 8, 1, 5):
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(step.result(), expected)


def test_callers_on_several_threads_share_the_pool() -> None:
    steps = [Step(seed) for seed in range(3)]
    expected = [step.result() for step in steps]
    failed: list[int] = []

    def repeat(index: int) -> None:
        torch.set_num_threads(THREADS)
        for _ in range(100):
            if not torch.equal(steps[index].result(), expected[index]):
                failed.append(index)

    threads = [threading.Thread(target=repeat, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive(), "a caller waits for ever"
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_child_process_starts_threads_of_its_own() -> None:
    step = Step(1)
    expected = step.result()
    child = os.fork()
    if child == 0:
        # The library alone: torch's own threads do not survive a fork.
        library.load().fastllama_run(step.graph._ops, len(step.graph._ops), THREADS)
        os._exit(0 if step.out.tolist() == expected.tolist() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(step.result(), expected)
