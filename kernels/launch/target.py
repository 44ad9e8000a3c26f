"""The GPU that kernels are launched on: what the launch tables need to know of it.

Everything comes from triton's active driver, so that a stand-in driver, which compiles for a GPU that is not here, gets
that GPU's launches.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import triton

from fastllama.kernels.launch.interpreter import interpreting

# A keyword of every launch: a float32 product and the sum that takes it are one instruction, rounded once. Otherwise
# matvec would need two for each weight. No rounding point of Meta's code is lost: those are conversions to the model
# dtype, in which no product is added up. Triton's own default changes from 3.9 to 3.10.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Target:
    """One kind of GPU."""

    backend: Literal["cuda", "hip"]
    arch: int | str  # compute capability times ten, or the name of an AMD architecture
    processors: int  # streaming multiprocessors, or compute units
    shared_bytes: int  # shared memory that one program may have
    warp_size: int = 32


# What interpreted kernels are launched as: an H200 of one multiprocessor, so that a small model's weights are dealt
# to few programs, as a large one's are to many.
INTERPRETED = Target("cuda", 90, 1, 232448)


def current_target() -> Target:
    """The GPU that the next launch goes to: torch's current device."""
    return INTERPRETED if interpreting() else target_of(triton.runtime.driver.active.get_current_device())


@cache
def target_of(device: int) -> Target:
    """The GPU of an index."""
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
