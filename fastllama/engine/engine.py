"""The engine: answers any number of requests at once, with rows that join and leave between decode steps.

    engine = llm.engine()
    request = engine.submit("Once upon a time", SamplingParams(max_gen_len=64))
    for increment in request: ...       # or request.result()

A step computes a chunk of waiting prompts and one token of every running answer. `step` runs one step; iterating over a
request does so until the request has something new. Or `start` runs steps in a thread, and requests may be submitted,
read and cancelled from any thread and from asyncio. None of these calls waits for a step: the next one takes in what
was submitted and cancelled since.
"""

import itertools
import logging
import threading
from contextlib import ExitStack

import torch

from fastllama import memory_plan, validate
from fastllama.engine.any_engine import AnyEngine
from fastllama.engine.commands import Cancellation, Command, NewRequest, Task
from fastllama.engine.core import EngineCore
from fastllama.engine.facts import Facts, Model
from fastllama.engine.grammar_matcher import GrammarMatcher
from fastllama.engine.inbox import Inbox
from fastllama.engine.prompts import new_matcher
from fastllama.engine.recovery import describe
from fastllama.engine.request import Request
from fastllama.engine.stats import Stats
from fastllama.prefill import PREFILL_CHUNK_TOKENS
from fastllama.torch_settings import default_settings

logger = logging.getLogger(__name__)
STEP_TOKENS = 512  # of prompts, in a step beside running answers, which wait for them


class Engine(AnyEngine):
    """Runs requests on a Llama. While it has requests, no other call may use the model."""

    leads_processes = False  # whether it tells other processes that share the model what to do

    def __init__(self, llm: Model, *, max_tokens_per_step: int = STEP_TOKENS, reuse_prefixes: bool = True) -> None:
        """Make an engine; nothing runs yet.

        max_tokens_per_step: of prompts, computed in one step while answers are running, which wait for them. While none
        are, a step computes up to 2048, which is the most here, too. reuse_prefixes: prompts that begin alike share the
        pages of what they have in common.
        """
        self.llm = llm
        step_tokens = validate.whole_number("max_tokens_per_step", max_tokens_per_step, 1, PREFILL_CHUNK_TOKENS)
        reuses = validate.flag("reuse_prefixes", reuse_prefixes)
        self._core = EngineCore(llm.decoder, step_tokens, reuses_prefixes=reuses)
        self._numbers, self._arrivals = itertools.count(1), itertools.count()
        self._held: ExitStack | None = None  # the model, while there are requests
        self._lock = threading.RLock()  # of the core: held during a step
        self._mail = threading.Condition()  # of all else: never held for long. It is taken after the other lock
        self._inbox, self._n_submitted = Inbox(), 0  # answers
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def facts(self) -> Facts:
        """What requests are checked against."""
        return Facts.of(self.llm)

    def accept(self, command: NewRequest) -> Request:
        """A checked request -> its handle. One without a number gets it here, with its random streams."""
        matcher = new_matcher(self.facts, command)  # it takes time: before the lock
        try:
            with self._mail:
                self._check_open()
                is_first = self._hold_model()
                try:
                    request = self._new_request(command, matcher)
                except BaseException:
                    if is_first:
                        self._release_model_if_idle()
                    raise
        finally:
            self._follow_at_once()
        return request

    def _new_request(self, command: NewRequest, matcher: GrammarMatcher | None) -> Request:
        """The handle of a request that the next step takes in."""
        if not command.number:
            streams = self.llm.random_streams(command.params.seed, command.params.n)
            command = command._replace(number=next(self._numbers), streams=tuple(streams))
        sequences = command.sequences(self.llm.tokenizer, self._arrivals, matcher)
        request = Request(self, command)
        request.sequences = sequences
        self._put(command, request)
        self._n_submitted += len(sequences)
        return request

    def step(self) -> bool:
        """Run one step -> whether there are unfinished requests."""
        with self._lock:
            if self._has_work:
                self._run(Task.STEP)
            return self._has_work

    def run(self) -> None:
        """Run steps until all requests have ended."""
        while self.step():
            pass

    def cancel(self, request: Request) -> None:
        """End the answers of a request that have not ended. Its reader learns it from the last increment."""
        with self._mail:
            if not request.is_finished:
                self._put(Cancellation(request.number), request)
        self._follow_at_once()

    def cancel_number(self, number: int) -> None:
        """`cancel` by the request's number. It may have ended."""
        for request in {one for one in self._core.requests.values() if one.number == number}:
            self.cancel(request)

    @property
    def state(self) -> list[int]:
        """Numbers that are equal in all processes that share the model, between steps."""
        core, scheduler = self._core, self._core.scheduler
        return [core.n_ended, len(scheduler.running), len(scheduler.waiting), scheduler.pool.n_available]

    @property
    def stats(self) -> Stats:
        """What the engine holds, and has done. Does not wait for a step."""
        core, scheduler, ended = self._core, self._core.scheduler, self._core.n_ended
        running = len(scheduler.running)
        waiting = max(0, self._n_submitted - ended - running)
        counts = core.n_finished, core.n_cached_tokens, core.n_preemptions
        return Stats(running, waiting, core.n_used_pages, scheduler.pool.n_pages, *counts)

    @property
    def has_thread(self) -> bool:
        """Whether steps run in the engine's own thread."""
        return self._thread is not None

    def start(self) -> "Engine":
        """Run steps in a thread of the engine's own from now on, whenever there are requests -> the engine."""
        if self.llm.model.group.size > 1 and not self.leads_processes:
            raise RuntimeError(
                "several processes share this model, and with a thread each of them would take in requests at another "
                "moment: use distributed.shared_engine.open_engine"
            )
        with self._mail:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_thread, name="fastllama engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Cancel all requests and end the thread, after the step that runs."""
        with self._mail:
            self._closing = True
            self._mail.notify_all()
        thread = self._thread
        if thread is None:
            self._end_all()
        elif thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def _run_thread(self) -> None:
        while True:
            with self._mail:
                self._mail.wait_for(lambda: self._has_work or self._closing)
                if self._closing:
                    break
            try:
                self.step()
            except BaseException as error:  # the requests have it, and `failure`
                logger.error("the engine cannot go on: %s", describe(error), exc_info=error)
                if self.failure is None:  # it came from outside of a step's work
                    self._fail(error)
                break
        self._end_all()

    @property
    def _has_work(self) -> bool:
        return bool(self._core.requests) or not self._inbox.is_empty

    def _put(self, command: Command, request: Request | None) -> None:
        self._inbox.put(command, request)
        self._mail.notify_all()

    def _follow_at_once(self) -> None:
        """Without a thread, follow the commands now."""
        if self._thread is None:
            with self._lock:
                if not self._inbox.is_empty:
                    self._run(Task.NOTHING)
                self._release_model_if_idle()

    def _run(self, task: Task) -> None:
        """Follow the commands, then do the task. After an error that cannot be survived all requests end."""
        with default_settings(), torch.inference_mode():
            try:
                with self._mail:
                    commands = self._inbox.gather()
                self._announce(commands, task)
                try:
                    with memory_plan.explain_out_of_memory(self.llm.model.device):
                        self._do(task)
                except Exception as error:
                    self._core.recover(error)
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._release_model_if_idle()

    def _announce(self, commands: list[Command], task: Task) -> None:
        """Tell other processes what comes next."""

    def _do(self, task: Task) -> None:
        core = self._core
        self._inbox.follow(self._follow)
        if task is Task.STEP and core.requests:
            core.step()
        elif task is Task.CLOSE:
            for request in dict.fromkeys(core.requests.values()):
                core.cancel(request)

    def _follow(self, command: Command, request: Request) -> None:
        core = self._core
        if isinstance(command, Cancellation):
            core.cancel(request)
            return
        if not core.requests:  # not: if the model was not held. Processes that share it would differ in this
            core.begin()
        core.add(request)

    def _end_all(self) -> None:
        """Cancel all requests, in the thread that runs the steps. No new one comes."""
        with self._lock:
            while self._has_work:
                self._run(Task.CLOSE)
            self._release_model_if_idle()

    def _fail(self, error: BaseException) -> None:
        """End all requests with an error."""
        stopped = error if isinstance(error, Exception) else RuntimeError(f"the engine was stopped by {error!r}")
        with self._mail:
            self.failure = error
            self._closing |= self._thread is not None
            left = self._inbox.clear()
            self._core.fail(stopped)
            for request in left:
                if not request.is_finished:
                    request.fail(stopped)
            self._core.n_ended = self._n_submitted

    def _check_open(self) -> None:
        if self._closing:
            state = "is closed" if self.failure is None else f"has failed ({self.failure!r})"
            raise RuntimeError(f"the engine {state}: make another")

    def _hold_model(self) -> bool:
        """Take the model for the first of several requests -> whether it is that. RuntimeError: another call has it."""
        if self._held is not None:
            return False
        with ExitStack() as stack:
            stack.enter_context(self.llm.model.exclusively())
            if self.llm.model.device.type == "cuda":
                self.llm.decoder.graphs.use_current_stream()  # the engine's thread waits for this one
            self.failure, self._held = None, stack.pop_all()
        return True

    def _release_model_if_idle(self) -> None:
        with self._mail:
            if self._held is not None and not self._has_work:
                self._held.close()
                self._held = None
