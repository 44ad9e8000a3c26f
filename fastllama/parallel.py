"""Which process of how many this is."""

import os

from fastllama import validate


def world_size() -> int:
    """The number of processes torchrun started, 1 under plain python. ValueError if WORLD_SIZE is no number."""
    value = os.environ.get("WORLD_SIZE") or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE must be a number of processes, got {value!r}: unset it")
    return int(value)


def check_single_process(model_parallel_size: int | None) -> None:
    """Raise ValueError where the caller or torchrun asks for a model split over several processes."""
    asked = 1 if model_parallel_size is None else validate.whole_number("model_parallel_size", model_parallel_size, 1)
    for size, source in ((asked, "model_parallel_size"), (world_size(), "torchrun's WORLD_SIZE")):
        if size > 1:
            raise ValueError(
                f"{source} asks for {size} processes, but a model runs in one process here, whatever the "
                "checkpoint's number of shards: use plain python or torchrun --nproc_per_node 1"
            )
