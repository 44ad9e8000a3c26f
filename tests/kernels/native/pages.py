"""Numbers that are no page's, for a page table."""

from collections.abc import Callable

from fastllama.kernels.paged_cache import LayerCache

NO_PAGES: dict[str, Callable[[LayerCache], int]] = {
    "before": lambda cache: -1,
    "after": lambda cache: cache.k.shape[0],
    "least": lambda cache: -(2**31),
    "largest": lambda cache: 2**31 - 1,
}


def no_page(kind: str, cache: LayerCache) -> int:
    """A number that is no page's of this cache."""
    return NO_PAGES[kind](cache)
