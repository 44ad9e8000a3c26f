"""Integer arithmetic for launches. Triton's own functions also serve kernels and take ten microseconds per call."""


def ceil_div(size: int, block: int) -> int:
    """size / block, rounded up."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, for a size of at least 1."""
    return 1 << (size - 1).bit_length()
