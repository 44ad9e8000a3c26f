"""Settings of all tests: one thread, derandomised hypothesis, and NaN in uninitialised memory.

With a GPU, kernels are compiled and run on it; without one, triton interprets them on the CPU.

Tests marked `slow` run only with --all (`make test-all`): more sizes and more GPUs for properties that other tests
check. OMP_NUM_THREADS sets another number of threads.
"""

import gc
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fastllama.distributed import environment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, also for child processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in os.environ.keys() - environment.single_process_environ().keys():
    del os.environ[name]  # a launcher's variables, which are not for the tests

if not os.environ.get("OMP_NUM_THREADS"):
    torch.set_num_threads(1)

hypothesis.settings.register_profile("fastllama", derandomize=True, deadline=None, max_examples=30, database=None)
hypothesis.settings.load_profile("fastllama")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --all."""
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


# The longest files start first, or one pytest process would end long after the others.
LONGEST = (
    "test_compiled.py",
    "test_serve.py",
    "test_shared_engine.py",
    "test_model_parallel.py",
    "test_nproc.py",
    "test_report.py",
    "test_sample.py",
    "test_fused.py",
    "test_compiled_variants.py",
    "test_compiled_kernel.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the LONGEST files first, the others in their order. Skip slow tests without --all."""
    if not config.getoption("all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: make test-all runs it"))
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Keep what was imported and collected out of garbage collections, which would look through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nan_in_empty_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the result of torch.empty and torch.empty_like with NaN, so that reads of unwritten memory show.

    Not in tests marked `compiles`: torch.compile lists torch's functions once, and traces only those.
    """
    if request.node.get_closest_marker("compiles"):
        from torch._dynamo import trace_rules

        trace_rules.clear_lru_cache()  # the list may be from a test in which they were replaced
        return
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _filled_with_nan(getattr(torch, name)))


def _filled_with_nan(allocate):  # type: ignore[no-untyped-def]
    def allocate_nan(*args, **kwargs):  # type: ignore[no-untyped-def]
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan


@pytest.fixture(autouse=True)
def no_global_state_changed() -> Iterator[None]:
    """Fail a test that changes torch's default dtype, default device or grad mode."""
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    yield
    after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    assert after == before, f"torch's default dtype, device or grad mode changed: {before} -> {after}"
