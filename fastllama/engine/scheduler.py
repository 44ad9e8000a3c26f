"""Decides which sequences run, on which rows and pages, and whose prompts are computed in a step. Knows no tensors.

First come, first served: waiting sequences start in the order of their arrival, as soon as a row and the pages for
their tokens are free. A running sequence takes one more page whenever it outgrows its last one. If none is left, the
sequence that arrived last gives all its pages back and waits again: its tokens are kept, and computed again when there
is room. So the oldest sequence always goes on, and as no sequence is accepted that the cache could not hold alone,
every sequence ends.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple

from fastllama.engine.sequence import Sequence
from fastllama.kernels.paged_cache import PAGE_TOKENS, pages_for
from fastllama.page_pool import Digest, PagePool, extend_digests


class Chunk(NamedTuple):
    """Tokens [begin, end) of a sequence, to be computed in one pass."""

    sequence: Sequence
    begin: int
    end: int


class Move(NamedTuple):
    """A running sequence changes its row."""

    sequence: Sequence
    source: int
    target: int


class Scheduler:
    """Sequences, waiting and running, and the pages they hold.

    A step is `admit`, `compact`, `next_chunks`, then `grow`. The caller applies `new_entries` to the page table before
    it launches anything that reads them.
    """

    def __init__(self, pool: PagePool, n_rows: int, *, reuses_prefixes: bool = True) -> None:
        self.pool = pool
        self.reuses_prefixes = reuses_prefixes
        self.waiting: list[Sequence] = []  # in the order of arrival, as is the next
        self.running: list[Sequence] = []
        self.new_entries: dict[tuple[int, int], int] = {}  # page by row and place, not yet in the table
        self._free_rows = list(range(n_rows))

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits. The cache can hold it (`check_fits`)."""
        insort(self.waiting, sequence, key=lambda one: one.arrival)

    def admit(self, most: int | None = None, *, only: Sequence | None = None) -> list[Sequence]:
        """Start waiting sequences while there are rows and pages -> those that were started.

        most: that may run together. only: the one that may run.
        """
        started: list[Sequence] = []
        while self.waiting and self._free_rows and (most is None or len(self.running) < most):
            sequence = self.waiting[0] if only is None else only
            if sequence.row is not None or not self._give_pages(sequence):
                break
            self.waiting.remove(sequence)
            self._free_rows.sort()  # low rows, so that steps run few
            sequence.row = self._free_rows.pop(0)
            self._set_entries(sequence, 0)
            insort(self.running, sequence, key=lambda one: one.arrival)
            started.append(sequence)
        return started

    def compact(self, size_of: Callable[[int], int]) -> list[Move]:
        """Move running sequences from high rows to free low ones, if steps become smaller by it -> the moves.

        size_of: the number of rows that a step of so many rows runs.
        """
        moves: list[Move] = []
        while self.is_sparse(size_of):
            sequence = max(self.running, key=lambda one: one.placed_row)
            source, target = sequence.placed_row, min(self._free_rows)
            self._free_rows.remove(target)
            self._free_rows.append(source)
            self._drop_entries(source)
            sequence.row = target
            self._set_entries(sequence, 0)
            moves.append(Move(sequence, source, target))
        return moves

    def is_sparse(self, size_of: Callable[[int], int]) -> bool:
        """Whether `compact` has anything to do."""
        return size_of(rows_in_use(self.running)) > size_of(len(self.running))

    def next_chunks(self, n_tokens: int) -> list[Chunk]:
        """The next tokens to be computed, at most n_tokens, of the oldest sequences first. They count as computed."""
        chunks: list[Chunk] = []
        for sequence in self.running:
            left = len(sequence.tokens) - 1 - sequence.n_computed
            count = min(left, n_tokens)
            if count > 0 and not sequence.is_decoding:
                chunks.append(Chunk(sequence, sequence.n_computed, sequence.n_computed + count))
                sequence.n_computed += count
                n_tokens -= count
        return chunks

    def grow(self, n_tokens: int = 1) -> bool:
        """Give every decoding sequence the pages for so many more tokens -> whether there were enough."""
        return all(self._grow(sequence, n_tokens) for sequence in self.running if sequence.is_decoding)

    def preempt(self) -> Sequence:
        """The youngest running sequence gives its row and pages back and waits. None of its steps may be in flight."""
        sequence = self.running[-1]
        if sequence.in_flight:
            raise RuntimeError("a sequence with steps in flight cannot be put back: receive them first")
        self.remember(sequence)
        self._take_back(sequence)
        sequence.put_back()
        insort(self.waiting, sequence, key=lambda one: one.arrival)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended: its row and pages are free."""
        if sequence.row is None:
            self.waiting.remove(sequence)
            return
        self.remember(sequence)
        self._take_back(sequence)

    def remember(self, sequence: Sequence) -> None:
        """Let later prompts find the full pages of a sequence's computed tokens."""
        if not self.reuses_prefixes:
            return
        for number in range(sequence.n_remembered, min(sequence.n_computed, len(sequence.tokens)) // PAGE_TOKENS):
            extend_digests(sequence.digests, sequence.tokens, number + 1)
            self.pool.remember(sequence.pages[number], sequence.digests[number])
            sequence.n_remembered = number + 1

    def _give_pages(self, sequence: Sequence) -> bool:
        """Pages for all tokens of a waiting sequence, those in the cache first -> whether there were enough."""
        found = self._cached_pages(sequence)
        if found is None:
            return False
        missing = pages_for(min(len(sequence.tokens), sequence.last)) - len(found)
        # A running sequence that may grow soon needs one more, and it should not push this one out again.
        spare = sum(len(one.pages) < pages_for(one.last) for one in self.running)
        self.pool.share(found)
        if missing + spare > self.pool.n_available:
            self.pool.release(found)
            return False
        sequence.pages = found + self.pool.take(missing)
        sequence.n_computed = len(found) * PAGE_TOKENS
        sequence.n_remembered = len(found)
        if sequence.is_new:
            sequence.is_new, sequence.n_cached = False, sequence.n_computed
        return True

    def _cached_pages(self, sequence: Sequence) -> list[int] | None:
        """The pages that are in the cache already; None if a running sequence is about to compute the next one.

        The newest token is always computed, as are those to be scored.
        """
        if not self.reuses_prefixes:
            return []
        reusable = len(sequence.tokens) - 1
        if sequence.first_scored is not None:
            reusable = min(reusable, sequence.first_scored - 1)
        n_pages = max(0, reusable) // PAGE_TOKENS
        extend_digests(sequence.digests, sequence.tokens, n_pages)
        found = self.pool.find(sequence.digests[:n_pages])
        is_coming = len(found) < n_pages and sequence.digests[len(found)] in self._coming()
        return None if is_coming else found

    def _coming(self) -> set[Digest]:
        """The full pages that running sequences have yet to compute of their prompts."""
        coming: set[Digest] = set()
        for sequence in self.running:
            if not sequence.is_decoding:
                extend_digests(sequence.digests, sequence.tokens, (len(sequence.tokens) - 1) // PAGE_TOKENS)
                coming.update(sequence.digests[sequence.n_remembered :])
        return coming

    def _grow(self, sequence: Sequence, n_tokens: int) -> bool:
        """Pages for the positions of the next tokens, as far as the sequence may go."""
        end = min(len(sequence.tokens) + sequence.most_in_flight + n_tokens - 1, sequence.last_ahead)
        missing = pages_for(end) - len(sequence.pages)
        if missing > self.pool.n_available:
            return False
        if missing > 0:
            before = len(sequence.pages)
            sequence.pages += self.pool.take(missing)
            self._set_entries(sequence, before)
        return True

    def _set_entries(self, sequence: Sequence, begin: int) -> None:
        assert sequence.row is not None
        for number in range(begin, len(sequence.pages)):
            self.new_entries[sequence.row, number] = sequence.pages[number]

    def _take_back(self, sequence: Sequence) -> None:
        row = sequence.row
        assert row is not None
        self.running.remove(sequence)
        self._free_rows.append(row)
        self._drop_entries(row)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.row, sequence.n_remembered = [], None, 0

    def _drop_entries(self, row: int) -> None:
        for place in [place for place in self.new_entries if place[0] == row]:
            del self.new_entries[place]


def check_fits(last: int, n_pages: int) -> None:
    """Raise ValueError if a cache of so many pages could never hold a sequence whose last token comes at `last`."""
    if pages_for(last) > n_pages:
        raise ValueError(
            f"this request needs up to {last} positions of the cache, which has {n_pages * PAGE_TOKENS}: shorten "
            "the prompt, lower max_gen_len, or build with a larger cache_tokens"
        )


def rows_in_use(sequences: Items[Sequence]) -> int:
    """The number of rows that a step has to run for these sequences, which need not be adjacent."""
    return max((sequence.row + 1 for sequence in sequences if sequence.row is not None), default=0)
