"""The memory plan: it counts what is allocated, and names the sizes that fit."""

import errno
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fastllama import ModelArgs, Transformer, cgroups, memory_plan
from fastllama.kernels.paged_cache import PAGE_TOKENS
from fastllama.memory_plan import DoesNotFit, check_fits, plan_memory
from fastllama.quantization import Scheme
from tests.support.checkpoints import tiny_params


def published(**changes: Any) -> ModelArgs:
    fields = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
    }
    return ModelArgs(vocab_size=128256, **(fields | changes))


def test_plan_of_llama3_8b() -> None:
    plan = plan_memory(published(), torch.bfloat16, max_batch_size=1, max_seq_len=8192)
    assert plan.weights == 8_030_261_248 * 2 + 8192 * 128 * 4
    assert plan.cache == (8192 + PAGE_TOKENS) * 131_072
    assert plan.total == plan.weights + plan.cache + plan.workspace and plan.workspace < 2 * 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plan_counts_the_tensors_of_a_model(dtype: torch.dtype) -> None:
    args = ModelArgs(max_batch_size=3, max_seq_len=40, **tiny_params())
    model = Transformer(args, dtype=dtype)
    plan = plan_memory(args, dtype, 3, 40)
    tensors = [*model.parameters(), model.rope]
    assert plan.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert plan.cache == sum(tensor.numel() * tensor.element_size() for tensor in (model.cache.k, model.cache.v))


def test_a_shared_tied_output_counts_once() -> None:
    apart = plan_memory(published(), torch.bfloat16, 1, 128)
    shared = plan_memory(published(tied_output=True), torch.bfloat16, 1, 128)
    assert apart.weights - shared.weights == 128256 * 4096 * 2


def test_error_names_the_precision_of_the_weights() -> None:
    stored = {"layers.0.feed_forward.w2.weight": Scheme("int8")}
    for quantize, files, text in (
        (None, {}, "in torch.bfloat16 needs"),
        (None, stored, "in torch.bfloat16, weights as stored, needs"),
        ("int4", stored, "in int4 needs"),
    ):
        with pytest.raises(DoesNotFit, match=text):
            check_fits(published(), torch.bfloat16, free=0, quantize=quantize, stored=files)


def test_error_names_the_largest_sizes_that_fit() -> None:
    args = published(max_batch_size=32, max_seq_len=8192)
    free = 24 * 2**30
    with pytest.raises(DoesNotFit) as caught:
        check_fits(args, torch.bfloat16, free)
    message = str(caught.value)
    rows = int(message.split("max_batch_size=")[2].split()[0])
    length = int(message.split("max_seq_len=")[2].split()[0])
    assert plan_memory(args, torch.bfloat16, rows, 8192).total <= free
    assert plan_memory(args, torch.bfloat16, rows + 1, 8192).total > free
    assert plan_memory(args, torch.bfloat16, 32, length).total <= free
    assert plan_memory(args, torch.bfloat16, 32, length + 1).total > free
    with pytest.raises(DoesNotFit, match="not even one row of one token"):
        check_fits(args, torch.bfloat16, 2**30)


def test_check_fits_returns_the_plan() -> None:
    args = published(max_batch_size=1, max_seq_len=128)
    assert check_fits(args, torch.bfloat16, 40 * 2**30) == plan_memory(args, torch.bfloat16, 1, 128)


CPU = torch.device("cpu")


def set_limits(monkeypatch: pytest.MonkeyPatch, **limits_bytes: int) -> None:
    """Make `resource.getrlimit` return these limits on the process's memory, RLIMIT_AS and RLIMIT_DATA."""
    resource = pytest.importorskip("resource", reason="only Unix has limits of a process")
    by_number = {getattr(resource, name): value for name, value in limits_bytes.items()}
    monkeypatch.setattr(
        resource, "getrlimit", lambda number: (by_number.get(number, resource.RLIM_INFINITY), resource.RLIM_INFINITY)
    )


@pytest.mark.parametrize(
    ("address_space", "data", "status", "expected"),
    [
        (None, None, "VmSize: 100 kB\n", []),
        (2**20, None, "Name:\tx\nVmSize:\t   24 kB\n", [(1000 * 2**10, "under ulimit -v 1024")]),
        (2**20, 2**21, "VmSize: 24 kB\nVmData: 48 kB\n", None),
        (2**12, None, "VmSize: 24 kB\n", [(0, "under ulimit -v 4")]),
        (2**20, None, "nothing\nVmSize:\n", [(2**20, "under ulimit -v 1024")]),
    ],
)
def test_limits_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address_space: Any, data: Any, status: str, expected: Any
) -> None:
    given = {"RLIMIT_AS": address_space, "RLIMIT_DATA": data}
    set_limits(monkeypatch, **{name: value for name, value in given.items() if value is not None})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(status)
    both = [(1000 * 2**10, "under ulimit -v 1024"), (2000 * 2**10, "under ulimit -d 2048")]
    assert memory_plan.process_limits(tmp_path) == (both if expected is None else expected)
    if address_space == 2**20:
        assert memory_plan.process_limits(tmp_path / "nowhere")[0].free == 2**20


@pytest.mark.parametrize(
    ("machine", "container", "process", "where"),
    [
        (3, 5, 7, "on this machine"),
        (5, 3, 7, "in this container (memory.max 9 MiB)"),
        (5, 7, 3, "under ulimit -v 9"),
        (3, None, None, "on this machine"),
    ],
)
def test_the_tightest_limit_is_named(
    monkeypatch: pytest.MonkeyPatch, machine: int, container: int | None, process: int | None, where: str
) -> None:
    mib = 2**20
    in_container = (
        None if container is None else cgroups.FreeMemory(container * mib, "in this container (memory.max 9 MiB)")
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": machine * mib}))
    monkeypatch.setattr(cgroups, "free_memory", lambda: in_container)
    of_process = [] if process is None else [cgroups.FreeMemory(process * mib, "under ulimit -v 9")]
    monkeypatch.setattr(memory_plan, "process_limits", lambda: of_process)
    assert memory_plan.free_memory_and_limit(CPU) == (3 * mib, where) and memory_plan.free_memory(CPU) == 3 * mib
    with pytest.raises(DoesNotFit) as caught:
        check_fits(
            published(),
            torch.bfloat16,
            memory_plan.free_memory(CPU),
            limit=memory_plan.free_memory_and_limit(CPU).limit,
        )
    assert f" and 0.00 GiB are free {where}: not even one row of one token would fit" in str(caught.value)


def test_processes_on_one_machine_share_its_memory_but_not_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8000}))
    monkeypatch.setattr(cgroups, "free_memory", lambda: None)
    monkeypatch.setattr(memory_plan, "process_limits", lambda: [cgroups.FreeMemory(5000, "under ulimit -v 4")])
    assert memory_plan.free_memory_and_limit(CPU) == (4000, "on this machine")
    monkeypatch.setattr(memory_plan, "process_limits", lambda: [cgroups.FreeMemory(3000, "under ulimit -v 4")])
    assert memory_plan.free_memory_and_limit(CPU) == (3000, "under ulimit -v 4")


def failures() -> dict[str, Exception]:
    damaged = ValueError("file.pth: is truncated or damaged")
    damaged.__cause__ = RuntimeError("unable to mmap 9 bytes from file <file.pth>: Cannot allocate memory (12)")
    return {
        "torch": RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        "python": MemoryError(),
        "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
        "wrapped": damaged,
    }


@pytest.mark.parametrize("kind", failures())
def test_a_failed_allocation_names_the_limit(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    found = cgroups.FreeMemory(2**29, "under ulimit -v 9")
    monkeypatch.setattr(memory_plan, "free_memory_and_limit", lambda device: found)
    message = (
        "^out of memory: 0.50 GiB are free under ulimit -v 9; use a smaller model, max_batch_size or max_seq_len, or "
        "raise the limit$"
    )
    with pytest.raises(DoesNotFit, match=message), memory_plan.explain_out_of_memory(CPU):
        raise failures()[kind]


@pytest.mark.parametrize(
    "error",
    [ValueError("/out of memory/x: no file"), OSError(2, "No file"), RuntimeError("busy"), KeyError(1)],
)
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_plan.explain_out_of_memory(CPU):
        raise error
    assert caught.value is error
