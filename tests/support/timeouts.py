"""How long a test waits for another thread or process."""

import time
from collections.abc import Callable

HANG_SECONDS = 300.0  # long enough for a busy machine, so only a hang reaches it


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that another thread or process does. Fails if it never comes."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.005)
