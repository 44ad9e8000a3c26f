"""Which process of how many this is."""

import os


def world_size() -> int:
    """The number of processes torchrun started, 1 under plain python. ValueError if WORLD_SIZE is no number."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE must be a number of processes, got {value!r}: unset it")
    return int(value)


def check_single_process(model_parallel_size: int | None) -> None:
    """Raise ValueError where the caller or torchrun asks for a model split over several processes."""
    for size, source in ((model_parallel_size, "model_parallel_size"), (world_size(), "torchrun's WORLD_SIZE")):
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{source} must be a positive integer or None, got {size!r}")
        if size > 1:
            raise ValueError(
                f"{source} asks for {size} processes, but this version runs a model in one process, whatever the "
                "checkpoint's number of shards: run it under plain python or torchrun --nproc_per_node 1"
            )
