"""Arithmetic of launches in plain Python: triton's own serves kernels as well, and takes ten microseconds a call."""


def ceil_div(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least power of two that is not below a size of at least 1."""
    return 1 << (size - 1).bit_length()
