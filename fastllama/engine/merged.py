"""Several requests read as one stream."""

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from fastllama.engine.request import Request, Wake
from fastllama.engine.sequence import Increment


class Numbered(NamedTuple):
    """An increment, and the number of its request."""

    number: int
    increment: Increment


async def merged(requests: Sequence[Request]) -> AsyncIterator[list[Numbered]]:
    """What has come of any of the requests since the last time, as soon as there is something.

    Raises the engine's error, if it has failed.
    """
    wake = Wake()
    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(request.waking(wake))
        while True:
            are_finished = all(request.is_finished for request in requests)  # before the increments are taken
            found = [Numbered(number, one) for number, request in enumerate(requests) for one in request.take()]
            if found:
                yield found
            elif are_finished:
                for request in requests:
                    request.raise_error()
                return
            else:
                await wake.wait()
