"""KVCache: rows take pages from one pool, find those of equal prompts, and the table says which."""

from typing import Any

import pytest
import torch

from fastllama.cache import KVCache, n_pages
from fastllama.kernels.reference import allocate
from fastllama.page_pool import OutOfPages

SIZES: dict[str, Any] = {"n_layers": 2, "max_batch_size": 3, "n_kv_heads": 2, "max_seq_len": 200, "head_dim": 4}
PROMPT = list(range(150))


def cache_of(**changes: Any) -> KVCache:
    memory: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "allocate": allocate}
    return KVCache(**{**SIZES, **changes}, **memory)


def row_of(cache: KVCache, row: int) -> list[int]:
    """The pages of a row in the table."""
    return [page for page in cache.table[row].tolist() if page != cache.pool.n_pages]


@pytest.mark.parametrize(
    ("cache_tokens", "pages"), [(None, 12), (1, 1), (64, 1), (65, 2), (600, 10), (10**9, 12)], ids=str
)
def test_a_cache_has_pages_for_its_tokens_and_one_that_belongs_to_no_row(cache_tokens: int | None, pages: int) -> None:
    cache = cache_of(cache_tokens=cache_tokens)
    assert cache.pool.n_pages == n_pages(3, 200, cache_tokens) == pages
    assert cache.k.shape == cache.v.shape == (2, pages + 1, 2, 64, 4)
    assert cache.length == 256 and cache.table.shape == (3, 4) and bool((cache.table == pages).all())
    assert not cache.k.any() and cache.layer(1).k.data_ptr() == cache.k[1].data_ptr()


@pytest.mark.parametrize("name", [*SIZES, "cache_tokens"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the cache needs {name} of at least 1, got 0"):
        cache_of(**{name: 0})


def test_rows_get_pages_of_their_own_and_give_them_back() -> None:
    cache = cache_of()
    assert cache.assign([150, 1, 64]) == [0, 0, 0]
    rows = [row_of(cache, row) for row in range(3)]
    assert [len(row) for row in rows] == [3, 1, 1] and len({page for row in rows for page in row}) == 5
    cache.extend([150, 70, 64])
    assert row_of(cache, 0) == rows[0] and len(row_of(cache, 1)) == 2 and row_of(cache, 1)[:1] == rows[1]
    cache.release()
    assert cache.pool.n_available == 12


def test_a_prompt_finds_the_pages_of_an_earlier_one_but_not_its_last_token() -> None:
    cache = cache_of()
    cache.assign([150])
    pages = row_of(cache, 0)
    cache.remember(0, PROMPT)
    for prompt, found in ((PROMPT, 128), (PROMPT[:129], 128), (PROMPT[:128], 64), (PROMPT[:64], 0), ([9, *PROMPT], 0)):
        assert cache.assign([len(prompt), len(prompt)], [prompt, prompt]) == [found, found]
        for row in range(2):
            assert row_of(cache, row)[: found // 64] == pages[: found // 64]
            assert row_of(cache, row)[found // 64 : len(prompt) // 64 + 1] != pages[found // 64 : len(prompt) // 64 + 1]


def test_rows_of_an_earlier_call_give_their_pages_when_they_are_needed() -> None:
    cache = cache_of(cache_tokens=4 * 64)
    cache.extend([128, 128])
    before = row_of(cache, 0)
    cache.extend([192])
    assert row_of(cache, 0)[:2] == before and cache.pool.n_available == 1


def test_rows_that_do_not_fit_together_are_refused() -> None:
    cache = cache_of(cache_tokens=4 * 64)
    cache.check_fits([128, 128])
    with pytest.raises(
        ValueError, match="2 rows of up to 129 positions need 5 pages of 64 positions, and the cache has 4"
    ):
        cache.check_fits([128, 129])
    with pytest.raises(OutOfPages):
        cache.assign([200, 200])


def test_entries_are_set_by_row_and_place() -> None:
    cache = cache_of()
    cache.set_entries({})
    cache.set_entries({(0, 2): 7, (2, 0): 5})
    assert cache.table[0].tolist() == [12, 12, 7, 12] and cache.table[2].tolist() == [5, 12, 12, 12]
