"""The numbers of an engine."""

from typing import NamedTuple


class Stats(NamedTuple):
    """What the engine holds, and has done since it was made."""

    running: int  # answers that have a row
    waiting: int  # answers that wait: for a step that takes them in, for a row or for pages
    used_pages: int  # pages that answers hold
    pages: int
    finished_requests: int
    cached_tokens: int  # of prompts, that were found in the cache
    preemptions: int  # answers that gave their pages back and were computed again
