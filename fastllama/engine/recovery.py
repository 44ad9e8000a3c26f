"""After a step that failed: which sequences are to blame, and whether the engine can go on.

An error of a launch has no address: it may come from any of the sequences that ran, or from their company. So all of
them are put back, as when pages run out, and those that ran become suspects. They run one at a time, the oldest first,
each until it has a new token: then its prefill and a step have worked. Who fails alone is to blame, and the failure of
the others is forgotten. They go on together. If only their company fails, at most half as many run together from then
on, and who was part of MAX_FAILURES such failures ends. So no error comes back for ever.
"""

import torch

from fastllama.engine.sequence import Sequence
from fastllama.model import Transformer

MAX_FAILURES = 3  # of steps for which nobody alone was to blame, that a sequence may be part of


class Suspects:
    """The sequences that ran in steps that failed, until they end."""

    def __init__(self) -> None:
        self._failures: dict[Sequence, int] = {}
        self._together: list[list[Sequence]] = []  # those of each failure of several
        self._queue: list[Sequence] = []  # to run alone, in the order of arrival
        self._n_tokens: dict[Sequence, int] = {}  # of those in the queue, when they were put there
        self._most_together: int | None = None

    @property
    def first(self) -> Sequence | None:
        """The one that runs alone now; None: all may run together."""
        self._drop_ended()
        return self._queue[0] if self._queue else None

    @property
    def most_together(self) -> int | None:
        """How many may run together; None: as many as there are rows."""
        self._drop_ended()
        return self._most_together

    def blame(self, ran: list[Sequence]) -> list[Sequence]:
        """These ran in a step that failed -> those that are to end."""
        if len(ran) == 1:
            self._explain(ran[0])
        else:
            self._together.append(ran)
        for sequence in ran:
            self._failures[sequence] = self._failures.get(sequence, 0) + 1
        ending = [one for one in ran if len(ran) == 1 or self._failures[one] >= MAX_FAILURES]
        if len(ran) > 1 and any(self._failures[one] > 1 for one in ran):
            self._most_together = len(ran) // 2
        self._queue = sorted({*self._queue, *ran}.difference(ending), key=lambda one: one.arrival)
        self._n_tokens |= {one: len(one.tokens) for one in ran}
        return ending

    def is_cleared(self, sequence: Sequence) -> bool:
        """Whether a suspect has got past the point of its failure."""
        return len(sequence.tokens) > self._n_tokens[sequence]

    def clear_first(self) -> None:
        """The one that ran alone may run with the others."""
        self._queue.pop(0)

    def _explain(self, culprit: Sequence) -> None:
        """The failures that this one was part of were its own: nobody else has failed."""
        for ran in [ran for ran in self._together if culprit in ran]:
            self._together.remove(ran)
            for sequence in ran:
                if sequence in self._failures:
                    self._failures[sequence] -= 1

    def _drop_ended(self) -> None:
        if not self._failures:
            return
        self._failures = {one: count for one, count in self._failures.items() if one.finish_reason is None}
        self._together = [ran for ran in self._together if any(one in self._failures for one in ran)]
        self._queue = [one for one in self._queue if one in self._failures]
        self._n_tokens = {one: self._n_tokens[one] for one in self._failures}
        if all(count <= 1 for count in self._failures.values()):
            self._most_together = None


def is_survivable(error: BaseException, model: Transformer) -> bool:
    """Whether a model can compute again after this error in a step."""
    if not isinstance(error, Exception) or isinstance(error, torch.AcceleratorError):
        return False
    if model.group.size > 1:  # the other processes may have got further, or nowhere
        return False
    if model.device.type == "cuda":
        try:
            torch.cuda.synchronize(model.device)
        except Exception:  # of the device: all that follows fails likewise
            return False
    return True


def is_of_one_sequence(error: Exception, model: Transformer) -> bool:
    """Whether an error in the host's work for one sequence can end that sequence alone.

    Processes that share a model do the same work on the same tokens, but their memory is their own.
    """
    return model.group.size == 1 or not isinstance(error, MemoryError)


def describe(error: BaseException) -> str:
    """An error for whoever sent the request."""
    return f"{type(error).__name__}: {error}"
