"""The key/value cache: the keys and values of earlier tokens, in pages that rows take from a pool."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastllama.kernels.batch import upload
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache, pages_for
from fastllama.page_pool import Digest, PagePool, extend_digests


class KVCache:
    """Keys and values of every layer, (L, P, K, PAGE_TOKENS, D) each, and the table of the rows' pages.

    `pool` counts the pages. Pages may hold old values after a row's end, which nothing reads.
    """

    def __init__(
        self,
        n_layers: int,
        max_batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        cache_tokens: int | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        allocate: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor],
    ) -> None:
        """Allocate both tensors, with the backend's `allocate`. Raises ValueError for a size below 1.

        cache_tokens: positions of all rows together, in complete pages; None means max_seq_len for every row.
        """
        sizes = {
            "n_layers": n_layers,
            "max_batch_size": max_batch_size,
            "n_kv_heads": n_kv_heads,
            "max_seq_len": max_seq_len,
            "head_dim": head_dim,
            "cache_tokens": 1 if cache_tokens is None else cache_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"the cache needs {name} of at least 1, got {size}")
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.pool = PagePool(n_pages(max_batch_size, max_seq_len, cache_tokens))
        shape = n_layers, self.pool.n_pages + 1, n_kv_heads, PAGE_TOKENS, head_dim  # the last page belongs to no row
        self.k = allocate(shape, dtype, device).zero_()
        self.v = allocate(shape, dtype, device).zero_()
        table_shape = max_batch_size, pages_for(max_seq_len)
        self.table = torch.full(table_shape, self.pool.n_pages, dtype=torch.int32, device=device)
        self._pages_of_row: list[list[int]] = [[] for _ in range(max_batch_size)]

    @property
    def length(self) -> int:
        """Positions of a row in complete pages: max_seq_len or a few more."""
        return self.table.shape[1] * PAGE_TOKENS

    @property
    def n_row_pages(self) -> int:
        """Pages that rows have from `assign` and `extend`."""
        return len({page for pages in self._pages_of_row for page in pages})

    def share_pages(self, other: "KVCache") -> None:
        """Use the pages of another cache with as many of them: the same numbers, rows and table."""
        self.pool, self.table, self._pages_of_row = other.pool, other.table, other._pages_of_row

    def layer(self, index: int) -> LayerCache:
        """One layer's pages, as views, with the table."""
        return LayerCache(self.k[index], self.v[index], self.table)

    def check_fits(self, lengths: Sequence[int]) -> None:
        """Raise ValueError if rows of these lengths do not fit together."""
        if sum(map(pages_for, lengths)) > self.pool.n_pages:
            raise ValueError(
                f"{len(lengths)} rows of up to {max(lengths)} positions need {sum(map(pages_for, lengths))} pages of "
                f"{PAGE_TOKENS} positions, and the cache has {self.pool.n_pages}: pass fewer rows, lower max_gen_len, "
                "build with a larger cache_tokens, or use generate_many, which needs no place for all rows at once"
            )

    def assign(self, lengths: Sequence[int], prompts: Sequence[Sequence[int]] | None = None) -> list[int]:
        """Give rows 0, 1, … pages for so many positions each, and take the pages of all other rows.

        prompts: the rows' tokens, to begin with pages that hold them already. Their last token is not among these.
        Returns how many tokens each row finds there. Raises OutOfPages if the rows do not fit.
        """
        self.release()
        for prompt, pages in zip(prompts or (), self._pages_of_row, strict=False):
            digests: list[Digest] = []
            extend_digests(digests, prompt, (len(prompt) - 1) // PAGE_TOKENS)
            pages += self.pool.find(digests)
            self.pool.share(pages)
        found = [list(pages) for pages in self._pages_of_row[: len(lengths)]]
        self.set_entries({(row, at): page for row, pages in enumerate(found) for at, page in enumerate(pages)})
        self.extend(lengths)
        return [len(pages) * PAGE_TOKENS for pages in found]

    def remember(self, row: int, tokens: Sequence[int]) -> None:
        """Let later prompts find the full pages of a row's computed tokens."""
        digests: list[Digest] = []
        extend_digests(digests, tokens, len(tokens) // PAGE_TOKENS)
        for page, digest in zip(self._pages_of_row[row], digests, strict=False):
            self.pool.remember(page, digest)

    def extend(self, lengths: Sequence[int]) -> None:
        """Give rows 0, 1, … pages up to so many positions each; pages that they have stay. Raises OutOfPages.

        Other rows keep their pages as long as these suffice.
        """
        missing = [
            max(0, pages_for(length) - len(pages)) for length, pages in zip(lengths, self._pages_of_row, strict=False)
        ]
        if sum(missing) > self.pool.n_available:
            self._release_rows(len(lengths))
        taken = iter(self.pool.take(sum(missing)))
        changes: dict[tuple[int, int], int] = {}
        for row, count in enumerate(missing):
            pages = self._pages_of_row[row]
            for _ in range(count):
                changes[row, len(pages)] = page = next(taken)
                pages.append(page)
        self.set_entries(changes)

    def release(self) -> None:
        """Take the pages of all rows that `assign` and `extend` gave."""
        self._release_rows(0)

    def reset_pages(self) -> None:
        """Free all pages, whoever uses them, and forget what they hold: after an error in the middle of a change."""
        for pages in self._pages_of_row:
            pages.clear()
        self.pool.reset()

    def _release_rows(self, first: int) -> None:
        """Take the pages of the rows from `first` on."""
        for pages in self._pages_of_row[first:]:
            self.pool.release(pages)
            pages.clear()

    def set_entries(self, pages: Mapping[tuple[int, int], int]) -> None:
        """Set entries of the table, by row and number of the page in the row. Does not wait for the device."""
        if pages:
            entries = upload([(*place, page) for place, page in pages.items()], torch.int64, self.table.device)
            rows, numbers, values = entries.T
            self.table[rows, numbers] = values.int()


def n_pages(max_batch_size: int, max_seq_len: int, cache_tokens: int | None = None) -> int:
    """The pages of a cache: for `cache_tokens` positions, or for max_seq_len positions of every row if that is less."""
    most = max_batch_size * pages_for(max_seq_len)
    return most if cache_tokens is None else min(most, pages_for(cache_tokens))
