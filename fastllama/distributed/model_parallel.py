"""The group of processes that share a model, and the two collectives that it needs.

As in Meta's code, torchrun starts the processes, torch.distributed connects them (NCCL between GPUs, gloo between
CPUs), and fairscale's groups define which processes share a model. A model in one process uses none of them.
"""

import atexit
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllama import validate
from fastllama.distributed.environment import distributed_environment, local_rank, world_size
from fastllama.distributed.rendezvous import connect_store

GLOO_EXIT_SECONDS = 0.05
LOADING_TIMEOUT = timedelta(hours=2)  # for a process that reads from a slower disk
FAIRSCALE_GROUPS = "fairscale.nn.model_parallel.initialize"
_group_numbers = itertools.count()
# Writes one output tensor, while dist.all_gather copies to a list. It has a new name from torch 2.13 on.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessFailed(RuntimeError):
    """Another process that shares the model failed; the message says which, and why."""


@dataclass(frozen=True)
class Group:
    """The processes that share a model; this one is number `rank`. All must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    processes: Any = None  # torch.distributed's group, for the collectives
    hosts: Any = None  # a gloo group of the same processes, with a longer timeout, for errors while loading

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the processes, in place: the same bits in each."""
        if self.size > 1:
            dist.all_reduce(x, group=self.processes)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The columns of all processes: x (N, V / size) -> (N, V)."""
        if self.size == 1:
            return x
        parts: Tensor = x.new_empty(self.size * x.shape[0], x.shape[1])
        _all_gather(parts, x.contiguous(), group=self.processes)
        return parts.view(self.size, *x.shape).movedim(0, 1).flatten(1)

    @contextlib.contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """A block after which all processes wait for each other. An error in one raises ProcessFailed in the others."""
        try:
            yield
        except Exception as error:  # a KeyboardInterrupt is this process's own and must not wait for others
            self._exchange_errors(error)
            raise
        self._exchange_errors(None)

    def _exchange_errors(self, error: BaseException | None) -> None:
        if self.size == 1:
            return
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}", self.hosts)
        failed = next((rank for rank, text in enumerate(errors) if text is not None), None)
        if error is None and failed is not None:
            raise ProcessFailed(f"process {failed} of {self.size} failed: {errors[failed]}")


SINGLE_PROCESS = Group()


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def connect_world() -> None:
    """Connect all processes of the launch over gloo, unless they are connected: models of one process each are not."""
    if not dist.is_initialized():
        _initialise_world(torch.device("cpu"))


def gpu_index() -> int:
    """The index of this process's GPU: LOCAL_RANK, or the current GPU.

    It is the current GPU in one process, with one visible GPU, and if the caller has set another GPU than 0. Raises
    ValueError if there are more processes than GPUs.
    """
    current, count = torch.cuda.current_device(), torch.cuda.device_count()
    # GPU 0 is CUDA's default. With one visible GPU, each process was given its own.
    if world_size() == 1 or current or count == 1:
        return current
    if local_rank() >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank()} and torch sees {count} GPUs here: use torchrun --nproc_per_node {count}"
        )
    return local_rank()


def model_group(model_parallel_size: int | None, device: torch.device) -> Group:
    """The group of processes that share this process's model. All processes must call it together.

    Uses fairscale's groups and torch.distributed if the caller has initialised them; otherwise it initialises them.
    If the world is larger than `model_parallel_size` (None: the whole world), consecutive ranks share a model.
    Raises ValueError for a size that does not divide the world, or that differs from the caller's groups.
    """
    requested = (
        None if model_parallel_size is None else validate.whole_number("model_parallel_size", model_parallel_size, 1)
    )
    callers_groups = sys.modules.get(FAIRSCALE_GROUPS)
    if callers_groups is not None and callers_groups.model_parallel_is_initialized():
        return _initialised_group(callers_groups, requested, device)
    world = dist.get_world_size() if dist.is_initialized() else world_size()
    size = world if requested is None else requested
    if world % size:
        raise ValueError(
            f"model_parallel_size asks for {size} processes and {world} were started: use torchrun --nproc_per_node "
            f"{size}, or a size that divides {world}"
        )
    if size == 1:
        return SINGLE_PROCESS
    groups = _import_fairscale_groups()
    if not dist.is_initialized():
        _initialise_world(device)
    with _without_prints(groups):
        groups.initialize_model_parallel(size)
    return _initialised_group(groups, requested, device)


@contextlib.contextmanager
def _without_prints(module: Any) -> Iterator[None]:
    """Suppress the module's own print calls. sys.stdout stays unchanged, since other threads may use it."""
    module.print = lambda *values, **options: None
    try:
        yield
    finally:
        del module.print


def _initialised_group(groups: Any, requested: int | None, device: torch.device) -> Group:
    """The Group for fairscale's initialised groups. ValueError for another size, or a backend unfit for the device."""
    size = groups.get_model_parallel_world_size()
    if requested not in (None, size):
        raise ValueError(
            f"model_parallel_size asks for {requested} processes, and fairscale's existing groups have {size}: "
            "leave it out, or call destroy_model_parallel() first"
        )
    if size == 1:
        return SINGLE_PROCESS
    processes = groups.get_model_parallel_group()
    backends = dict(part.split(":") for part in dist.get_backend_config(processes).split(","))
    if backends.get(device.type) in (None, "gloo" if device.type == "cuda" else "nccl"):
        raise ValueError(
            f"the model is on {device.type}, and the processes are connected by {dist.get_backend(processes)}: use "
            f"init_process_group({'nccl' if device.type == 'cuda' else 'gloo'!r}) instead, or leave it to Llama.build"
        )
    return Group(groups.get_model_parallel_rank(), size, processes, _host_group(processes))


@functools.cache
def _host_group(processes: Any) -> Any:
    """A gloo group of the same processes: it needs no GPU, and its timeout is longer than that of the collectives."""
    ranks = dist.get_process_group_ranks(processes)
    options: dict[str, Any] = {"backend": "gloo", "timeout": LOADING_TIMEOUT, "use_local_synchronization": True}
    # At exit, wait for gloo's threads: they free the last collective's tensors, which needs the interpreter.
    atexit.register(time.sleep, GLOO_EXIT_SECONDS)
    return dist.new_group(ranks, **options)


def _initialise_world(device: torch.device) -> None:
    environment = distributed_environment()
    options: dict[str, Any] = {}
    if environment is not None and not environment.has_torchrun_store:
        # A prefix for each group, because a later one must not read an earlier one's keys.
        store = dist.PrefixStore(f"group {next(_group_numbers)}", connect_store(environment))  # type: ignore[attr-defined]
        options = {"store": store, "rank": environment.rank, "world_size": environment.world_size}
    elif environment is not None:
        connect_store(environment)  # raises a clear error if torchrun's store cannot be reached
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, options["device_id"] = "nccl", torch.device("cuda", torch.cuda.current_device())
    try:
        dist.init_process_group(backend, **options)
    except RuntimeError as error:
        raise ValueError(f"{backend} cannot connect the processes: {error}") from error


def _import_fairscale_groups() -> Any:
    try:
        from fairscale.nn.model_parallel import initialize
    except ImportError as error:
        raise ValueError(
            "a model on several processes needs fairscale's groups, and fairscale is not installed: "
            "pip install fairscale"
        ) from error
    return initialize
