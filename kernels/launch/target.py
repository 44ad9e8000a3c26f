"""The GPU that kernels are launched on: the properties that launch tables use.

All of them come from Triton's active driver. So a substitute driver, which compiles for a GPU that is not in the
machine, gets the launches of that GPU.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import triton

from fastllama.kernels.launch.interpreter import interpreting

# Options of every launch: compute a float32 product and the sum it is added to in one instruction, rounded once.
# Without it matvec would need two instructions per weight. This removes no rounding point of Meta's code: those are
# conversions to the model dtype, and no product is summed in that dtype. Triton's default changes from 3.9 to 3.10.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Target:
    """One kind of GPU."""

    backend: Literal["cuda", "hip"]
    arch: int | str  # compute capability times ten, or the name of an AMD architecture
    processors: int  # streaming multiprocessors, or compute units
    shared_bytes: int  # the most shared memory of one program
    warp_size: int = 32


# The target of interpreted kernels: an H200 with one multiprocessor, so that the weights of a small model are assigned
# to few programs, as those of a large model are to many.
INTERPRETED = Target("cuda", 90, 1, 232448)


def current_target() -> Target:
    """The GPU of the next launch: torch's current device."""
    return INTERPRETED if interpreting() else target_of(triton.runtime.driver.active.get_current_device())


@cache
def target_of(device: int) -> Target:
    """The GPU with this index."""
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(device)
    return Target(
        target.backend,
        target.arch,
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
        target.warp_size,
    )
