"""The cache's pages, as the host counts them: which are free, which are shared, and which can be found again.

A page is used by any number of rows. A full page is found again by the hash of all tokens up to its end, so a prompt
that begins like an earlier one begins with that one's pages. A page that no row uses any more keeps its content until
it is needed: least recently used pages go first.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

from fastllama.kernels.paged_cache import PAGE_TOKENS

Digest = bytes
DIGEST_BYTES = 16


class OutOfPages(RuntimeError):
    """More pages were asked for than are available."""


class PagePool:
    """Pages 0 to n_pages - 1. `take` and `share` count a user of a page, `release` ends the use."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.reset()

    def reset(self) -> None:
        """Free all pages, whoever uses them: after an error that came in the middle of a change."""
        self._users = [0] * self.n_pages
        self._free = deque(range(self.n_pages))  # without content
        self._page_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # with content and without users, oldest first

    @property
    def n_available(self) -> int:
        """Pages that `take` can return."""
        return len(self._free) + len(self._unused)

    def take(self, n_pages: int) -> list[int]:
        """Pages for new content. Raises OutOfPages, and takes none, if fewer are available."""
        if n_pages > self.n_available:
            raise OutOfPages(f"{n_pages} pages were asked for and {self.n_available} of {self.n_pages} are available")
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(n_pages)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Count one more user of pages with content."""
        for page in pages:
            self._users[page] += 1
            self._unused.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """End a use of each page. Of a prompt's pages the last ones are dropped first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] < 0:
                raise ValueError(f"page {page} was released more often than it was taken")
            if self._users[page] == 0:
                if page in self._digest_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """The pages with this content, from the beginning up to the first that is not there. `share` keeps them."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def remember(self, page: int, digest: Digest) -> None:
        """Let `find` return this page, which is full. Of pages with the same content only the first is found."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def forget(self) -> None:
        """Let `find` return no page: the weights that made the contents have changed."""
        self._page_of.clear()
        self._digest_of.clear()
        self._free.extend(self._unused)
        self._unused.clear()

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page


def extend_digests(digests: list[Digest], tokens: Sequence[int], n_pages: int) -> None:
    """Add the digests of these tokens' full pages, up to the first n_pages: each of all tokens up to the page's end."""
    for number in range(len(digests), n_pages):
        page = array("q", tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS])
        if len(page) != PAGE_TOKENS:
            raise ValueError(f"page {number} of {len(tokens)} tokens is not full")
        previous = digests[-1] if digests else b""
        digests.append(hashlib.blake2b(previous + page.tobytes(), digest_size=DIGEST_BYTES).digest())
