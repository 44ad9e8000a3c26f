"""The loop of the engine: one step at a time, on one thread.

A step admits waiting sequences, moves running ones to low rows, computes a chunk of prompts, lets those that are
complete join the rows that decode, makes room for the next token of every row, enqueues one decode step, and takes in
the output of an earlier one.

An error in the host's work for one sequence ends its request. After any other error all sequences are put back, and
`recovery.py` finds out which of them is to blame.
"""

import logging

from fastllama.decode_graph import Decoder
from fastllama.engine.model_runner import ModelRunner, NewToken
from fastllama.engine.recovery import Suspects, describe, is_of_one_sequence, is_survivable
from fastllama.engine.request import Request
from fastllama.engine.scheduler import Scheduler
from fastllama.engine.sequence import FinishReason, Increment, Sequence
from fastllama.kernels.decode_state import NO_TOKEN
from fastllama.prefill import NOT_FINITE_CAUSE, PREFILL_CHUNK_TOKENS
from fastllama.step_graphs import graph_size

logger = logging.getLogger(__name__)


class EngineCore:
    """The requests of an engine, their scheduler and the model. The caller holds the model."""

    def __init__(self, decoder: Decoder, step_tokens: int, *, reuses_prefixes: bool) -> None:
        self.decoder = decoder
        self._step_tokens, self._reuses_prefixes = step_tokens, reuses_prefixes
        self._runner = ModelRunner(decoder)
        self.requests: dict[Sequence, Request] = {}  # the answers that have not ended
        self.n_finished = self.n_cached_tokens = self.n_preemptions = 0
        self.n_ended = 0  # answers. All counts are there before the reader of a request knows of it.
        self._suspects = Suspects()
        self.scheduler = self._new_scheduler()

    @property
    def n_used_pages(self) -> int:
        """Pages that answers hold."""
        pool = self.scheduler.pool
        return pool.n_pages - pool.n_available - self.decoder.model.cache.n_row_pages

    def begin(self) -> None:
        """Begin without requests. What the cache holds is found again, unless the model has another cache."""
        if self.scheduler.pool is not self.decoder.model.cache.pool:
            self.scheduler = self._new_scheduler()
        self._runner.begin()

    def _new_scheduler(self) -> Scheduler:
        cache = self.decoder.model.cache
        return Scheduler(cache.pool, cache.max_batch_size, reuses_prefixes=self._reuses_prefixes)

    def add(self, request: Request) -> None:
        """A new request waits. Raises ValueError if the cache could never hold it."""
        for sequence in request.sequences:
            self.scheduler.add(sequence)
            self.requests[sequence] = request

    def step(self) -> None:
        """Run one step. There must be a request."""
        scheduler, runner = self.scheduler, self._runner
        self._admit()
        self._compact()
        self._prefill()
        self._start_prefilled()
        self._make_room()
        decoding = [one for one in scheduler.running if one.is_decoding and one.steps_to_enqueue > 0]
        if decoding:
            self._flush_entries()
            runner.step(decoding)
        # Rows with grammars wait for their tokens to be received, so steps are queued ahead only of other rows.
        ahead = self.decoder.replays_ahead if any(one.matcher is None for one in decoding) else 0
        while runner.queued > ahead:
            self._receive()

    def cancel(self, request: Request) -> None:
        """End the answers of a request that have not ended."""
        for sequence in request.sequences:
            if sequence in self.requests:
                self.end(sequence, "cancelled")

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End an answer from outside its tokens."""
        try:
            increment = sequence.end(reason)
        except Exception as broken:  # of its last text
            increment, error = sequence.abandon(), error or describe(broken)
        self.requests[sequence].partial.answers[sequence.index].error = error
        try:
            if sequence.is_decoding:
                self._runner.stop([sequence.placed_row])
            self.scheduler.remove(sequence)
        finally:
            self._give(sequence, increment)

    def end_alone(self, sequence: Sequence, error: Exception) -> None:
        """After an error in the host's work for one sequence its request ends, and no other.

        Raises the error if other processes share the model and may not have it.
        """
        if not is_of_one_sequence(error, self.decoder.model):
            raise error
        logger.warning("a request failed: %s", describe(error), exc_info=error)
        self._end_request(self.requests[sequence], describe(error))

    def recover(self, error: Exception) -> None:
        """Go on after a step has failed. Raises the error if that cannot be, or nothing ran that could be to blame."""
        ran = [one for one in self.requests if one.row is not None]
        if not ran or not is_survivable(error, self.decoder.model):
            raise error
        logger.warning("a step of %d answers failed: %s", len(ran), describe(error), exc_info=error)
        self._forget_pages()
        for sequence in self.requests:
            sequence.put_back()
            self.scheduler.add(sequence)
        self._runner.recover()
        self.n_preemptions += len(ran)
        for request in dict.fromkeys(self.requests[one] for one in self._suspects.blame(ran)):
            self._end_request(request, describe(error))

    def _end_request(self, request: Request, error: str) -> None:
        """End all answers of a request: one may need what another computes, the log-probabilities of the prompt."""
        for sequence in request.sequences:
            if sequence in self.requests:
                self.end(sequence, "error", error)

    def fail(self, error: Exception) -> None:
        """All requests end with this error. The next one begins anew, whatever was left half done."""
        requests = dict.fromkeys(self.requests.values())
        for sequence in self.requests:
            sequence.finish_reason = "error"
        self.n_ended += len(self.requests)
        self.requests.clear()
        for request in requests:
            request.fail(error)
        self._forget_pages()

    def _forget_pages(self) -> None:
        """Nobody holds a page, and none can be found again: what the pages hold is not certain."""
        self.decoder.model.cache.reset_pages()
        self.scheduler = self._new_scheduler()

    def _admit(self) -> None:
        """Start waiting sequences: after a failure the suspects, one at a time."""
        suspects, scheduler = self._suspects, self.scheduler
        first = suspects.first
        while first is not None and suspects.is_cleared(first):
            while self._runner.queued:
                self._receive()
            if suspects.first is first:
                suspects.clear_first()
            if scheduler.waiting and first.row is not None:  # others come first, or alone
                self._preempt()
            first = suspects.first
        scheduler.admit(suspects.most_together, only=first)

    def _compact(self) -> None:
        """Give low rows to the sequences on high ones, if the steps then run fewer rows."""
        while self._runner.queued and self.scheduler.is_sparse(self._size_of):
            self._receive()  # the output of a queued step lies where its sequence was
        if moves := self.scheduler.compact(self._size_of):
            self._flush_entries()
            self._runner.move(moves)

    def _size_of(self, n_rows: int) -> int:
        """How many rows a step of so many rows runs."""
        return graph_size(n_rows, self.decoder.model.cache.max_batch_size)

    def _prefill(self) -> None:
        """Compute the next chunk of prompts."""
        scheduler = self.scheduler
        is_waited_for = any(one.is_decoding for one in scheduler.running)
        chunks = scheduler.next_chunks(self._step_tokens if is_waited_for else PREFILL_CHUNK_TOKENS)
        if not chunks:
            return
        self._flush_entries()
        scores = self._runner.prefill(chunks)
        for chunk in chunks:
            scheduler.remember(chunk.sequence)
        for sequence, found in scores.items():
            request = self.requests[sequence]
            sequence.count_scored(len(found))
            if sequence.index == 0:
                request.partial.prompt_scores = (request.partial.prompt_scores or []) + found
            if any(score.logprob != score.logprob for score in found):
                self._end_request(request, f"the logits of the prompt are not finite numbers; {NOT_FINITE_CAUSE}")

    def _start_prefilled(self) -> None:
        """Sequences whose prompts are computed begin to decode."""
        prefilled = [one for one in self.scheduler.running if one.is_prefilled and not one.is_decoding]
        ready = [one for one in prefilled if self._can_echo(one)]
        for sequence in ready:
            if not sequence.has_begun and (request := self.requests.get(sequence)):  # another may have ended it
                sequence.has_begun = True
                if sequence.index == 0:  # the others find what the first has computed
                    request.partial.cached_tokens = sequence.n_cached
                self.n_cached_tokens += sequence.n_cached
                if sequence.params.echo:
                    self._give_echo(sequence, request)
        ready = [one for one in ready if one.finish_reason is None]
        complete = [one for one in ready if one.matcher is not None and one.matcher.is_complete]
        starting = [one for one in ready if one.steps_to_enqueue > 0 and one not in complete]
        for sequence in ready:
            if sequence not in starting:
                self.end(sequence, "stop" if sequence in complete else "length")
        self._runner.start(starting)

    def _make_room(self) -> None:
        """Pages for the next step of all rows. If there are too few, the youngest sequences are put back."""
        scheduler = self.scheduler
        while not scheduler.grow(self.decoder.positions_ahead):
            if self._runner.queued:  # it may end sequences, and a sequence that is put back needs its tokens
                self._receive()
                continue
            self._preempt()

    def _preempt(self) -> None:
        """Put the youngest running sequence back, whose tokens are known."""
        row = self.scheduler.running[-1].placed_row
        self.scheduler.preempt()
        self._runner.stop([row])
        self.n_preemptions += 1

    def _receive(self) -> None:
        for new in self._runner.receive():
            self._take(new)

    def _take(self, new: NewToken) -> None:
        sequence = new.sequence
        if new.token == NO_TOKEN:
            self.end(
                sequence,
                "error",
                f"the logits at position {len(sequence.tokens)} are not finite numbers; {NOT_FINITE_CAUSE}",
            )
            return
        try:
            increment = sequence.add_token(new.token, new.logprob, new.top)
        except Exception as error:
            self.end_alone(sequence, error)
            return
        try:
            self.scheduler.remember(sequence)
            if increment.finish_reason is not None:
                if isinstance(increment.stop_reason, str):  # a stop string, which the device does not know
                    self._runner.stop([sequence.placed_row])
                else:
                    self.decoder.mark_finished(sequence.placed_row)
                self.scheduler.remove(sequence)
        finally:  # it is certain, whatever fails
            if increment.tokens or increment.text or increment.finish_reason is not None:
                self._give(sequence, increment)
        if increment.finish_reason is None and sequence.matcher is not None and sequence.matcher.error is not None:
            self.end(sequence, "error", sequence.matcher.error)

    def _give(self, sequence: Sequence, increment: Increment) -> None:
        request = self.requests[sequence]
        if increment.finish_reason is not None:
            self.n_ended += 1
            self.n_finished += request.n_open == 1
        request.add(increment)
        if increment.finish_reason is not None:
            del self.requests[sequence]

    def _can_echo(self, sequence: Sequence) -> bool:
        """Whether the log-probabilities of an echo are there: the first answer computes them, others may be ahead."""
        scores, wants = self.requests[sequence].partial.prompt_scores or [], sequence.params.logprobs is not None
        return not sequence.params.echo or not wants or len(scores) >= sequence.n_prompt - 1

    def _give_echo(self, sequence: Sequence, request: Request) -> None:
        try:
            echo = self._echo(sequence, request)
        except Exception as error:
            self.end_alone(sequence, error)
        else:
            request.add(echo)

    def _echo(self, sequence: Sequence, request: Request) -> Increment:
        """The prompt as the first increment of an answer."""
        prompt, wanted = sequence.tokens[: sequence.n_prompt], sequence.params.logprobs
        scores = request.partial.prompt_scores or []
        return Increment(
            index=sequence.index,
            text=sequence.text.push(prompt),
            tokens=prompt,
            logprobs=None if wanted is None else [0.0, *(score.logprob for score in scores)],
            top_logprobs=[[], *(score.top[:wanted] for score in scores)] if wanted else None,
            finish_reason=None,
            stop_reason=None,
        )

    def _flush_entries(self) -> None:
        self._runner.set_pages(self.scheduler.new_entries)
        self.scheduler.new_entries.clear()
