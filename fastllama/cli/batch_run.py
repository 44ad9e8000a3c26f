"""Answers the lines of a batch with an engine. Every process that shares the work runs `answer_lines`.

The processes that share a model take the same lines in the same order, and the first of them writes. Of several groups,
group k takes every line whose index has the remainder k.
"""

import contextlib
import dataclasses
import hashlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastllama.cli.batch_input import BadLine, BatchLine, LineSource, count_lines, open_input, parse_line
from fastllama.cli.batch_output import DUPLICATE, ID_PREFIX, Answered, OutputFile
from fastllama.distributed import driver, environment
from fastllama.engine import Request
from fastllama.engine.many import UNFINISHED_PER_ROW
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import AnswerFailed, InvalidRequest
from fastllama.openai_api.requests import ApiRequest, submit
from fastllama.openai_api.responses import response

if TYPE_CHECKING:
    from fastllama.generation import Llama

SEED_BYTES = 8
STATUS_OK = 200


@dataclass
class Counts:
    """What a run has done."""

    requests: int = 0  # lines that got an answer or an error
    errors: int = 0
    answered_before: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in the cache
    tokens: int = 0  # of the answers
    interrupted: bool = False


@dataclass(eq=False)
class OpenLine:
    """A line whose answers are being generated."""

    line: BatchLine
    request: ApiRequest
    submitted: list[Request]


class BatchRun:
    """One group's part of a batch."""

    def __init__(self, llm: "Llama", out: OutputFile | None, answered: Answered, seed: int, model: str) -> None:
        """out: None in processes that do not write. seed: of requests without one. model: of those without a name."""
        self.counts = Counts()
        self._llm, self._engine = llm, llm.engine()
        self._out, self._answered, self._seed = out, answered, seed
        self._model = ServedModel(model, llm.tokenizer)
        self._seen: set[str] = set()  # custom_ids
        self._open: list[OpenLine] = []

    def run(self, source: LineSource, group: int, n_groups: int, bar: "tqdm[Any]") -> None:
        """Answer all lines of one group."""
        most = UNFINISHED_PER_ROW * self._llm.model.params.max_batch_size
        with self._engine:
            while self._open or not source.at_end:
                while self._n_unfinished() < most:
                    taken = source.take(may_wait=not self._open)
                    if taken is None:
                        break
                    self._take(parse_line(*taken), is_ours=(taken[0] - 1) % n_groups == group)
                    bar.update(self._n_done() - bar.n)
                self._engine.step()
                self._collect()
                bar.update(self._n_done() - bar.n)

    def _n_unfinished(self) -> int:
        requests = (request for one in self._open for request in one.submitted if not request.is_finished)
        return sum(len(request.sequences) for request in requests)

    def _n_done(self) -> int:
        return self.counts.requests + self.counts.answered_before

    def _take(self, line: BatchLine, is_ours: bool) -> None:
        """Submit a line, unless it is answered already, or answer it with its error."""
        is_duplicate = line.custom_id in self._seen
        if line.custom_id is not None:
            self._seen.add(line.custom_id)
        if not is_ours:
            return
        if line.custom_id is None or is_duplicate:
            is_answered = line.number in self._answered.numbers
        else:
            is_answered = line.custom_id in self._answered.custom_ids
        if is_answered:
            self.counts.answered_before += 1
            return
        try:
            if is_duplicate:
                raise BadLine(f"an earlier line has the custom_id {line.custom_id!r:.60}", DUPLICATE)
            request = self._request(line)
            self._open.append(OpenLine(line, request, submit(self._engine, request)))
        except (BadLine, InvalidRequest) as error:
            self._write(line, error=error)

    def _request(self, line: BatchLine) -> ApiRequest:
        request = line.request(self._llm.formatter)
        if request.stream:
            raise InvalidRequest("stream is not supported in a batch: leave it out", code="unsupported_parameter")
        if request.params.seed is None:
            # The same draws, whatever was answered before, and by which process.
            name = f"{self._seed} {line.custom_id}".encode(errors="surrogatepass")
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=SEED_BYTES).digest())
            request = dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))
        return request

    def _collect(self) -> None:
        """Write the lines that have ended."""
        finished = [one for one in self._open if all(request.is_finished for request in one.submitted)]
        if finished:
            self._open = [one for one in self._open if one not in finished]
        for one in finished:
            results = [request.result() for request in one.submitted]
            try:
                body = response(one.request, results, self._model)
            except AnswerFailed as error:
                self._write(one.line, error=error)
                continue
            usage = body["usage"]
            self.counts.prompt_tokens += usage["prompt_tokens"]
            self.counts.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
            self.counts.tokens += usage["completion_tokens"]
            self._write(one.line, body)

    def _write(self, line: BatchLine, body: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        record: dict[str, Any] = {"id": f"{ID_PREFIX}{line.number}", "custom_id": line.custom_id}
        record["response"] = body and {"status_code": STATUS_OK, "request_id": body["id"], "body": body}
        record["error"] = error and {"code": getattr(error, "code", "server_error"), "message": str(error)}
        if self._out is not None:
            self._out.append(record)
        self.counts.requests += 1
        self.counts.errors += error is not None


def answer_lines(
    llm: "Llama", *, in_file: str, out_file: str, answered: Answered, seed: int, model: str, progress: bool
) -> dict[str, Any] | None:
    """Answer the lines of in_file that are not in `answered` -> Counts of all processes, in the first one.

    Ctrl-C ends it with the counts of this process so far.
    """
    rank, shared_by = _rank(), llm.model.group
    group, n_groups = rank // shared_by.size, environment.world_size() // shared_by.size
    with contextlib.ExitStack() as stack:
        stack.enter_context(_interruptible())
        source = stack.enter_context(open_input(in_file))
        out = None
        if shared_by.rank == 0:
            out = stack.enter_context(OutputFile(out_file, group, n_groups))
        run = BatchRun(llm, out, answered, seed, model)
        try:
            disable = None if progress and rank == 0 else True
            bar = stack.enter_context(tqdm(desc="answering", unit="request", disable=disable))
            if not bar.disable:
                bar.total = count_lines(in_file, group, n_groups)
            run.run(source, group, n_groups, bar)
            found = driver.gather("batch", asdict(run.counts if out is not None else Counts()))
        except KeyboardInterrupt:
            if rank > 0:
                raise
            return asdict(run.counts) | {"interrupted": True}
    return None if found is None else {name: sum(counts[name] for counts in found) for name in found[0]}


def _rank() -> int:
    launch = environment.distributed_environment()
    return launch.rank if launch is not None else 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A block that Ctrl-C interrupts, also within a call of the driver, which waits for its end."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
