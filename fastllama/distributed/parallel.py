"""The processes that share a model: which one this is, and the two collectives that they need.

torchrun starts the processes, torch.distributed connects them (NCCL between GPUs, gloo between CPUs) and fairscale's
groups say who shares a model with whom, as in Meta's code. None of it is touched where a model runs in one process.
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
from fastllama.distributed.environment import local_rank, several, world_size
from fastllama.distributed.rendezvous import meet

GLOO_ENDS_SECONDS = 0.05
LOADING_PATIENCE = timedelta(hours=2)  # with one that reads its part from a slower disk
FAIRSCALE_GROUPS = "fairscale.nn.model_parallel.initialize"
_groups_made = itertools.count()
# Into one tensor; what takes a list of tensors copies to each of them. torch 2.13 calls it by another name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessFailed(RuntimeError):
    """Another of the processes that share a model failed; the message says which, and why."""


@dataclass(frozen=True)
class Group:
    """The processes that share a model, of which this is number `rank`. Every one of them makes the same calls."""

    rank: int = 0
    size: int = 1
    processes: Any = None  # torch.distributed's group
    hosts: Any = None  # one between the same processes' hosts, which wait for each other's disks

    def all_reduce(self, x: Tensor) -> Tensor:
        """What every process has of a sum -> the sum, the same bits in each, in place of x."""
        if self.size > 1:
            dist.all_reduce(x, group=self.processes)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every process's columns, x (N, V / size) -> all of them, (N, V)."""
        if self.size == 1:
            return x
        parts: Tensor = x.new_empty(self.size * x.shape[0], x.shape[1])
        _all_gather(parts, x.contiguous(), group=self.processes)
        return parts.view(self.size, *x.shape).movedim(0, 1).flatten(1)

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block at whose end all wait for all. An error of one is ProcessFailed in the others."""
        try:
            yield
        except Exception as error:  # an interrupt is for this process alone, and must not wait for others
            self._check(error)
            raise
        self._check(None)

    def _check(self, error: BaseException | None) -> None:
        if self.size == 1:
            return
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}", self.hosts)
        failed = next((rank for rank, text in enumerate(found) if text is not None), None)
        if error is None and failed is not None:
            raise ProcessFailed(f"process {failed} of {self.size} failed: {found[failed]}")


ALONE = Group()


def is_first_process() -> bool:
    """Whether this is the process that speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gpu_index() -> int:
    """The GPU of this process: CUDA's current one, and where that is the first, as it is by itself, torchrun's.

    Raises ValueError where there are more processes than GPUs.
    """
    current, count = torch.cuda.current_device(), torch.cuda.device_count()
    if world_size() == 1 or current or count == 1:  # with one, each process has been given its own to see
        return current
    if local_rank() >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank()} and torch sees {count} GPUs here: use torchrun --nproc_per_node {count}"
        )
    return local_rank()


def model_group(model_parallel_size: int | None, device: torch.device) -> Group:
    """The group that this process shares a model with, made where there is none. All processes call it together.

    fairscale's groups are taken as they are where the caller has initialised them, and so is torch.distributed. Where
    the world is larger than `model_parallel_size` (None: the whole world), neighbours share a model.
    Raises ValueError for a size that the world cannot be divided into, or that the caller's groups have not.
    """
    asked = (
        None if model_parallel_size is None else validate.whole_number("model_parallel_size", model_parallel_size, 1)
    )
    theirs = sys.modules.get(FAIRSCALE_GROUPS)
    if theirs is not None and theirs.model_parallel_is_initialized():
        return _initialised(theirs, asked, device)
    world = dist.get_world_size() if dist.is_initialized() else world_size()
    size = world if asked is None else asked
    if world % size:
        raise ValueError(
            f"model_parallel_size asks for {size} processes and {world} were started: use torchrun --nproc_per_node "
            f"{size}, or a size that divides {world}"
        )
    if size == 1:
        return ALONE
    groups = _fairscale()
    if not dist.is_initialized():
        _initialise_world(device)
    with _silenced(groups):
        groups.initialize_model_parallel(size)
    return _initialised(groups, asked, device)


@contextlib.contextmanager
def _silenced(module: Any) -> Iterator[None]:
    """Nothing that the module's own code prints is seen; sys.stdout, which is everybody's, stays as it is."""
    module.print = lambda *words, **how: None
    try:
        yield
    finally:
        del module.print


def _initialised(groups: Any, asked: int | None, device: torch.device) -> Group:
    size = groups.get_model_parallel_world_size()
    if asked not in (None, size):
        raise ValueError(
            f"model_parallel_size asks for {asked} processes, and fairscale's groups, which are there already, are of "
            f"{size}: leave it out, or destroy_model_parallel() first"
        )
    if size == 1:
        return ALONE
    processes = groups.get_model_parallel_group()
    served = dict(part.split(":") for part in dist.get_backend_config(processes).split(","))
    if served.get(device.type) in (None, "gloo" if device.type == "cuda" else "nccl"):
        raise ValueError(
            f"the model is on {device.type}, and the processes are connected by {dist.get_backend(processes)}: "
            f"init_process_group({'nccl' if device.type == 'cuda' else 'gloo'!r}) instead, or leave it to build"
        )
    return Group(groups.get_model_parallel_rank(), size, processes, _hosts(processes))


@functools.cache
def _hosts(processes: Any) -> Any:
    """A group of the same processes that waits longer than those of collectives, and needs no GPU."""
    ranks = dist.get_process_group_ranks(processes)
    how: dict[str, Any] = {"backend": "gloo", "timeout": LOADING_PATIENCE, "use_local_synchronization": True}
    # gloo's threads give back the last collective's tensors, for which they need an interpreter that has not ended.
    atexit.register(time.sleep, GLOO_ENDS_SECONDS)
    return dist.new_group(ranks, **how)


def _initialise_world(device: torch.device) -> None:
    launch = several()
    how: dict[str, Any] = {}
    if launch is not None and not launch.has_agent:
        # Each group that is made, one after the other, has names of its own in the store.
        store = dist.PrefixStore(f"group {next(_groups_made)}", meet(launch))  # type: ignore[attr-defined]
        how = {"store": store, "rank": launch.rank, "world_size": launch.world_size}
    elif launch is not None:
        meet(launch)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, how["device_id"] = "nccl", torch.device("cuda", torch.cuda.current_device())
    try:
        dist.init_process_group(backend, **how)
    except RuntimeError as error:
        raise ValueError(f"{backend} cannot connect the processes: {error}") from error


def _fairscale() -> Any:
    try:
        from fairscale.nn.model_parallel import initialize
    except ImportError as error:
        raise ValueError(
            "a model on several processes needs fairscale's groups, and fairscale is not installed: "
            "pip install fairscale"
        ) from error
    return initialize
