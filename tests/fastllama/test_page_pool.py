"""The page pool: users are counted, contents are found again, and the least recently used page goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.kernels.paged_cache import PAGE_TOKENS
from fastllama.page_pool import Digest, OutOfPages, PagePool, extend_digests


def digests_of(tokens: list[int]) -> list[Digest]:
    digests: list[Digest] = []
    extend_digests(digests, tokens, len(tokens) // PAGE_TOKENS)
    return digests


def remembered(pool: PagePool, names: str) -> list[int]:
    """Pages with one-letter digests, released from the first to the last."""
    pages = pool.take(len(names))
    for page, name in zip(pages, names, strict=True):
        pool.remember(page, name.encode())
    for page in pages:
        pool.release([page])
    return pages


def test_pages_are_taken_once_and_returned() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    assert len(set(pages)) == 2 and pool.n_available == 1
    with pytest.raises(OutOfPages, match="2 pages were asked for and 1 of 3 are available"):
        pool.take(2)
    assert pool.n_available == 1, "none is taken if there are too few"
    pool.release(pages)
    assert pool.n_available == 3 and sorted(pool.take(3)) == [0, 1, 2]


def test_a_page_is_free_when_its_last_user_releases_it() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.n_available == 0
    pool.release(pages)
    assert pool.n_available == 2
    with pytest.raises(ValueError, match="page 1 was released more often than it was taken"):
        pool.release([1])


def test_contents_are_found_from_the_beginning_up_to_a_gap() -> None:
    pool = PagePool(4)
    a, b, d = remembered(pool, "abd")
    assert pool.find([b"a", b"b", b"c", b"d"]) == [a, b]
    assert pool.find([b"c", b"d"]) == [] and pool.find([b"d"]) == [d]


def test_a_page_that_is_shared_again_keeps_its_content() -> None:
    pool = PagePool(2)
    a, _ = remembered(pool, "ab")
    pool.share([a])
    pool.take(1)
    assert pool.find([b"a"]) == [a] and pool.find([b"b"]) == [], "the page without users was taken"
    with pytest.raises(OutOfPages):
        pool.take(1)


def test_least_recently_used_pages_go_first_and_free_ones_before() -> None:
    pool = PagePool(4)
    pages = remembered(pool, "abc")
    pool.share(pages[:1])
    pool.release(pages[:1])  # a is the newest now
    taken = pool.take(1)
    assert taken == [3], "a page without content is taken before any with content"
    gone: list[bytes] = []
    for _ in range(3):
        pool.take(1)
        gone += [name for name in (b"a", b"b", b"c") if name not in gone and not pool.find([name])]
    assert gone == [b"b", b"c", b"a"]


def test_the_last_pages_of_a_prompt_go_first() -> None:
    """A page whose beginning is gone could not be found."""
    pool = PagePool(3)
    pages = pool.take(3)
    for page, name in zip(pages, "abc", strict=True):
        pool.remember(page, name.encode())
    pool.release(pages)
    pool.take(1)
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]


def test_the_first_page_with_a_content_is_found_and_the_other_is_free_after_use() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.remember(first, b"a")
    pool.remember(second, b"a")
    pool.remember(first, b"b")
    assert pool.find([b"a"]) == [first] and pool.find([b"b"]) == []
    pool.release([first, second])
    assert pool.take(1) == [second]


def test_forgetting_frees_unused_pages_and_keeps_users() -> None:
    pool = PagePool(3)
    remembered(pool, "ab")
    (used,) = pool.take(1)
    pool.remember(used, b"c")
    pool.forget()
    assert pool.find([b"a"]) == [] and pool.find([b"c"]) == [] and pool.n_available == 2
    pool.release([used])
    assert sorted(pool.take(3)) == [0, 1, 2]


def test_a_reset_frees_every_page_and_content() -> None:
    pool = PagePool(3)
    remembered(pool, "ab")
    pool.share(pool.find([b"a"]))
    pool.reset()
    assert pool.find([b"a"]) == [] and sorted(pool.take(3)) == [0, 1, 2]


@given(st.lists(st.integers(0, 2**40), min_size=0, max_size=3 * PAGE_TOKENS), st.integers(0, 3 * PAGE_TOKENS - 1))
def test_a_digest_is_of_all_tokens_before_it(tokens: list[int], changed: int) -> None:
    digests = digests_of(tokens)
    assert len(digests) == len(tokens) // PAGE_TOKENS and digests == digests_of([*tokens, 1])[: len(digests)]
    if changed < len(tokens):
        tokens[changed] += 1
        same = [one == other for one, other in zip(digests, digests_of(tokens), strict=True)]
        assert same == [number < changed // PAGE_TOKENS for number in range(len(digests))]


def test_digests_are_only_of_full_pages() -> None:
    with pytest.raises(ValueError, match="page 1 of 100 tokens is not full"):
        extend_digests([], [1] * 100, 2)
    digests = digests_of([1] * 64)
    extend_digests(digests, [1] * 128, 2)
    assert digests == digests_of([1] * 128) and digests[0] != digests[1]
