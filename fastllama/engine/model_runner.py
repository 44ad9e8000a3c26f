"""Runs the scheduler's decisions on the model: chunks of prompts, and decode steps of all rows together.

Everything is enqueued on one stream, in this order: changes of the page table, chunks of prompts, rows that start and
stop, decode steps. So no launch sees a page or a row before or after its time, and nothing waits for the device.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch

from fastllama import threads
from fastllama.decode_graph import Decoder
from fastllama.engine.scheduler import Chunk, Move, rows_in_use
from fastllama.engine.sequence import Sequence, TopLogprobs
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, upload
from fastllama.kernels.sampling.controls import RowControls
from fastllama.output_copies import NewestSteps
from fastllama.step_graphs import Extras, graph_sizes
from fastllama.token_scores import TokenScore, score_tokens


class NewToken(NamedTuple):
    """A decode step's token of one sequence."""

    sequence: Sequence
    token: int
    logprob: float
    top: TopLogprobs


class ModelRunner:
    """The model's side of an engine. Only `receive`, scores of prompts and captures of graphs wait for the device."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.model = decoder.model
        self._in_flight: deque[tuple[list[Sequence], int]] = deque()  # sequences of each step, and their most tokens

    @property
    def queued(self) -> int:
        """Steps whose output has not been received."""
        return len(self._in_flight)

    def begin(self) -> None:
        """Begin with no rows. No row of an earlier call keeps its pages.

        The first time, CUDA graphs of all numbers of rows are captured: a capture waits for the device. A CPU's own
        graphs take a moment, and memory for each, so they are captured when they are needed.
        """
        self.decoder.begin()
        if self.model.device.type == "cuda":
            self.decoder.capture_sizes(graph_sizes(self.model.cache.max_batch_size))
        self.model.cache.release()
        self._in_flight.clear()

    def recover(self) -> None:
        """Begin again after an error, whatever it has left on the device."""
        self.model.workspace.reset()
        self.begin()

    def set_pages(self, entries: dict[tuple[int, int], int]) -> None:
        """Write entries of the page table."""
        with self.decoder.launch_context():
            self.model.cache.set_entries(entries)

    def prefill(self, chunks: Items[Chunk]) -> dict[Sequence, list[TokenScore]]:
        """Compute the keys and values of these tokens -> the scores of those whose log-probabilities are wanted."""
        model = self.model
        pieces = [(one.sequence.placed_row, one.begin, one.sequence.tokens[one.begin : one.end]) for one in chunks]
        with self.decoder.launch_context():
            batch = RaggedBatch.of(pieces, model.device, model.workspace)
            with model.suited(len(batch.tokens), max(segment.keys for segment in batch.segments)):
                h = model.hidden(batch)
                self._follow(chunks, batch)
                scores: dict[Sequence, list[TokenScore]] = {}
                for chunk, segment in zip(chunks, batch.segments, strict=True):
                    if chunk.sequence.first_scored is not None:
                        scores[chunk.sequence] = self._score(chunk, h[segment.begin : segment.end], batch)
            if model.device.type == "cpu":
                threads.end_openmp_threads()
        return scores

    def _follow(self, chunks: Items[Chunk], batch: RaggedBatch) -> None:
        """Let a draft model read prompts, too, if they are not only scored."""
        guesser = self.decoder.guesser
        answered = [one for one in chunks if one.sequence.steps_to_enqueue > 0]
        if guesser is None or not answered:
            return
        begun = [one.sequence for one in answered if one.begin == one.sequence.n_cached > 0]
        guesser.read_cached({one.placed_row: one.tokens[: one.n_cached] for one in begun})
        guesser.follow(batch)

    def start(self, sequences: Items[Sequence]) -> None:
        """These sequences take part in the steps from now on. Their newest tokens are fed first."""
        if not sequences:
            return
        state, rows = self.decoder.state, [one.placed_row for one in sequences]
        with self.decoder.launch_context():
            self._start_rows(sequences)
            state.set_stops(rows, [sorted(one.stop_ids) for one in sequences])
            drawn = SamplingTensors.per_row(
                [(one.params.temperature, one.params.top_p) for one in sequences],
                [one.stream for one in sequences],
                self.model.device,
            )
            state.sampling.set_rows(upload(rows, torch.int64, self.model.device), drawn)
            if state.controls is not None:
                self._set_controls(sequences)
            if state.masks is not None:
                state.masks.clear_rows(rows)
        self.decoder.set_histories({one.placed_row: one.tokens for one in sequences})
        self.decoder.set_lengths({one.placed_row: len(one.tokens) for one in sequences})
        for sequence in sequences:
            sequence.is_decoding = True

    def move(self, moves: Items[Move]) -> None:
        """These sequences go on at other rows. None of their steps may be in flight."""
        rows = [(one.source, one.target) for one in moves if one.sequence.is_decoding]
        if rows:
            with self.decoder.launch_context():
                self.decoder.state.move_rows(*zip(*rows, strict=True))
        for one in moves:
            self.decoder.control.move_row(one.source, one.target)
            self.decoder.mark_finished(one.source)
            if one.sequence.is_decoding:
                self.decoder.set_lengths({one.target: len(one.sequence.tokens)})

    def stop(self, rows: Items[int]) -> None:
        """These rows generate nothing in the steps from now on."""
        with self.decoder.launch_context():
            self.decoder.state.stop_rows(rows)
        for row in rows:
            self.decoder.mark_finished(row)

    def step(self, sequences: Items[Sequence]) -> None:
        """Enqueue the next step of these sequences."""
        n_rows, params = rows_in_use(sequences), [one.params for one in sequences]
        guided = [one for one in sequences if one.matcher is not None]
        extras = Extras(
            controls=any(one.needs_controls for one in params),
            top_tokens=any(one.logprobs for one in params),
            masks=bool(guided),
            scores=any(one.params.logprobs is not None for one in guided),
        )
        if extras.controls and self.decoder.state.controls is None:
            self.decoder.add_extras(extras)
            with self.decoder.launch_context():
                self._set_controls(sequences)
        self.decoder.select(n_rows, all(one.is_greedy for one in params), extras)
        self._guide(guided)
        with self.model.suited(n_rows, max(len(one.tokens) for one in sequences)):
            most_tokens = self.decoder.enqueue_steps()
        self._in_flight.append((list(sequences), most_tokens))
        for sequence in sequences:
            sequence.in_flight += self.decoder.unroll
            sequence.most_in_flight += most_tokens

    def _start_rows(self, sequences: Items[Sequence]) -> None:
        """Feed these sequences' newest tokens from the next step on."""
        self.decoder.state.start_rows(
            [one.placed_row for one in sequences],
            [one.tokens[-1] for one in sequences],
            [len(one.tokens) - 1 for one in sequences],
            [one.n_prompt for one in sequences],
            [one.last_ahead for one in sequences],
        )

    def _guide(self, sequences: Items[Sequence]) -> None:
        """These sequences take part in the next step alone, and draw tokens that their grammars allow.

        On the device their rows end after its token: the mask of the one after it depends on it.
        """
        if not sequences:
            return
        state, rows = self.decoder.state, [one.placed_row for one in sequences]
        assert state.masks is not None
        with self.decoder.launch_context():
            self._start_rows(sequences)
            state.masks.set_rows(rows, [one.matcher.mask for one in sequences if one.matcher is not None])
        self.decoder.set_lengths({one.placed_row: len(one.tokens) for one in sequences})
        if self.decoder.guesser is not None:
            self.decoder.guesser.leave_out_row()

    def receive(self) -> Iterable[NewToken]:
        """Wait for the oldest step -> the tokens of the sequences that had not ended before."""
        newest, control = self.decoder.receive_newest(), self.decoder.control
        sequences, most_tokens = self._in_flight.popleft()
        for sequence in sequences:
            sequence.in_flight -= self.decoder.unroll
            sequence.most_in_flight -= most_tokens
            if sequence.finish_reason is not None:
                continue
            first = sequence.n_generated
            found = control.new_tokens(newest, sequence.placed_row, sequence.n_prompt, first)
            if sequence.matcher is not None:
                found = found[:1]  # a row with a grammar ended after it, and the others of several steps are undefined
            for number, (token, logprob) in enumerate(found, first):
                if sequence.finish_reason is None:
                    yield NewToken(sequence, token, logprob, _top_logprobs(sequence, newest, number))
        control.note_guesses(newest)

    def _set_controls(self, sequences: Items[Sequence]) -> None:
        controls = self.decoder.state.controls
        assert controls is not None
        for sequence in sequences:
            controls.set_row(sequence.placed_row, _controls(sequence))

    def _score(self, chunk: Chunk, h: torch.Tensor, batch: RaggedBatch) -> list[TokenScore]:
        """Score the tokens that follow a chunk's tokens, from the first that is wanted: h (chunk, dim)."""
        sequence = chunk.sequence
        assert sequence.first_scored is not None
        begin = max(chunk.begin, sequence.first_scored - 1)
        targets = sequence.tokens[begin + 1 : min(chunk.end, sequence.n_prompt - 1) + 1]
        sources = list(range(begin - chunk.begin, begin - chunk.begin + len(targets)))
        if sources and chunk.begin + sources[-1] == sequence.n_prompt - 2:
            targets += sequence.alternatives
            sources += sources[-1:] * len(sequence.alternatives)
        return score_tokens(self.model, h, batch, sources, targets, sequence.n_top_scored)


def _top_logprobs(sequence: Sequence, newest: NewestSteps, number: int) -> TopLogprobs:
    """The most likely tokens in place of the sequence's new token of this number."""
    if newest.top_ids is None or newest.top_logprobs is None:
        return []
    at, row = number % len(newest.tokens), sequence.placed_row
    return list(zip(newest.top_ids[at, row].tolist(), newest.top_logprobs[at, row].tolist(), strict=True))


def _controls(sequence: Sequence) -> RowControls:
    params = sequence.params
    if not params.needs_controls:
        return RowControls()
    return RowControls(
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        min_p=params.min_p,
        top_k=params.top_k,
        min_position=sequence.n_prompt + params.min_tokens,
        bias=params.logit_bias,
        prompt=sequence.tokens[: sequence.n_prompt],
        generated=sequence.tokens[sequence.n_prompt : -1],  # the newest one is counted when it is fed
    )
