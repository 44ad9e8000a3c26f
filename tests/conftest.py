"""What every test runs under: one thread, derandomised properties, and NaN in all memory that nothing has written.

Where there is a GPU, kernels are compiled and tested on it; elsewhere triton interprets them on the CPU.

Tests marked `slow` run with --all only (`make test-all`): more sizes and more GPUs of what others test already.
OMP_NUM_THREADS in the environment sets another number of threads.
"""

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fastllama.distributed import environment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and in all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in os.environ.keys() - environment.single_process_environ().keys():
    del os.environ[name]  # what a launcher told somebody else

if not os.environ.get("OMP_NUM_THREADS"):
    torch.set_num_threads(1)

hypothesis.settings.register_profile("fastllama", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.load_profile("fastllama")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--all."""
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


# What takes longest begins first, or one process would end long after the others.
LONGEST = ("test_compiled.py", "test_fused.py", "test_sample.py", "test_nproc.py", "test_report.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; the order within a file, and of the others, stays. Slow tests are skipped without --all."""
    if not config.getoption("all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-all runs it"))
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in the tests."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nan_in_empty_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what torch.empty and its kin return, so that reading what was never written shows.

    Not for tests marked `compiles`: torch.compile makes a list of torch's functions once, and traces those alone.
    """
    if request.node.get_closest_marker("compiles"):
        from torch._dynamo import trace_rules

        trace_rules.clear_lru_cache()  # the list may have been made in a test that had them poisoned
        return
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate):  # type: ignore[no-untyped-def]
    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return poisoned


@pytest.fixture(autouse=True)
def no_global_state_changed() -> Iterator[None]:
    """Fail a test after which torch's defaults are not what they were."""
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    assert after == before, f"torch's default dtype, device or grad mode changed: {before} -> {after}"
