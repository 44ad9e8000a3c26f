"""The loop of the engine: one step at a time, on one thread.

A step admits waiting sequences, moves running ones to low rows, computes a chunk of prompts, lets those that are
complete join the rows that decode, makes room for the next token of every row, enqueues one decode step, and takes in
the output of an earlier one.
"""

from fastllama.decode_graph import Decoder
from fastllama.engine.model_runner import ModelRunner, NewToken
from fastllama.engine.request import Request
from fastllama.engine.scheduler import Scheduler
from fastllama.engine.sequence import FinishReason, Increment, Sequence
from fastllama.kernels.decode_state import NO_TOKEN
from fastllama.prefill import NOT_FINITE_CAUSE, PREFILL_CHUNK_TOKENS
from fastllama.step_graphs import graph_size


class EngineCore:
    """The requests of an engine, their scheduler and the model. The caller holds the model."""

    def __init__(self, decoder: Decoder, step_tokens: int, *, reuses_prefixes: bool) -> None:
        self.decoder = decoder
        self._step_tokens, self._reuses_prefixes = step_tokens, reuses_prefixes
        self._runner = ModelRunner(decoder)
        self.requests: dict[Sequence, Request] = {}  # the answers that have not ended
        self.n_finished = self.n_cached_tokens = self.n_preemptions = 0
        self.scheduler = self._new_scheduler()

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
        scheduler.admit()
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

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End an answer from outside its tokens."""
        if sequence.is_decoding:
            self._runner.stop([sequence.placed_row])
        self.requests[sequence].partial.answers[sequence.index].error = error
        increment = sequence.end(reason)
        self.scheduler.remove(sequence)
        self._give(sequence, increment)

    def fail(self, error: Exception) -> None:
        """All requests end with this error. The next one begins anew, whatever was left half done."""
        requests = set(self.requests.values())
        for sequence in self.requests:
            sequence.finish_reason = "error"
        self.requests.clear()
        self.scheduler.pool.reset()
        self.scheduler = self._new_scheduler()
        for request in requests:
            request.fail(error)

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
                self.end(sequence, "error", f"the logits of the prompt are not finite numbers; {NOT_FINITE_CAUSE}")

    def _start_prefilled(self) -> None:
        """Sequences whose prompts are computed begin to decode."""
        ready = [one for one in self.scheduler.running if one.is_prefilled and not one.is_decoding]
        for sequence in ready:
            request = self.requests[sequence]
            if not sequence.has_begun:
                sequence.has_begun = True
                if sequence.index == 0:  # the others find what the first has computed
                    request.partial.cached_tokens = sequence.n_cached
                self.n_cached_tokens += sequence.n_cached
                if sequence.params.echo:
                    request.add(self._echo(sequence, request))
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
            row = scheduler.running[-1].placed_row
            scheduler.preempt()
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
        increment = sequence.add_token(new.token, new.logprob, new.top)
        self.scheduler.remember(sequence)
        if increment.finish_reason is not None:
            if isinstance(increment.stop_reason, str):  # a stop string, which the device does not know
                self._runner.stop([sequence.placed_row])
            else:
                self.decoder.mark_finished(sequence.placed_row)
            self.scheduler.remove(sequence)
        if increment.tokens or increment.text or increment.finish_reason is not None:
            self._give(sequence, increment)
        if increment.finish_reason is None and sequence.matcher is not None and sequence.matcher.error is not None:
            self.end(sequence, "error", sequence.matcher.error)

    def _give(self, sequence: Sequence, increment: Increment) -> None:
        request = self.requests[sequence]
        request.add(increment)
        if increment.finish_reason is not None:
            del self.requests[sequence]
        self.n_finished += request.is_finished

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
