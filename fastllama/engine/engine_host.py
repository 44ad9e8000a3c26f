"""The engine's end of a connection to another process, which submits requests (`remote_engine.py`).

One thread takes in what comes. Another sends what the engine has for the requests: that of all of them together, and
the more rarely the more they are, as it competes with the engine's thread for the interpreter. What somebody waits for,
the begin and the end of an answer, goes at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from fastllama.engine.any_engine import EngineFailed
from fastllama.engine.commands import Cancellation, NewRequest
from fastllama.engine.engine import Engine
from fastllama.engine.messages import FromEngine, Listening, Question, Reply, Submission, ToEngine, Update
from fastllama.engine.recovery import describe
from fastllama.engine.request import Request

logger = logging.getLogger(__name__)

COMPILING_THREADS = 4  # of grammars
# Seconds until what nobody waits for is sent again: for each request of the last message, and at most.
REST = 0.003
LONGEST_REST = 0.05


class EngineHost:
    """Does with an engine what another process asks for."""

    def __init__(self, engine: Engine, connection: Connection) -> None:
        """engine: runs in its own thread."""
        self.listening = threading.Event()  # set once the other process is ready
        self.failure: Exception | None = None  # that has ended this host, though nothing was wrong with the connection
        self._engine, self._connection = engine, connection
        self._compiling = ThreadPoolExecutor(COMPILING_THREADS, "compile")
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # of all below
        self._open: dict[int, _Open] = {}  # requests whose end has not been sent
        self._due: dict[int, _Open] = {}  # of which something has come
        self._urgent: dict[int, _Open] = {}  # of which something has come that somebody waits for
        self._messages: list[FromEngine] = []
        self._is_closed = False

    def start(self) -> "EngineHost":
        """Begin, in two threads -> the host."""
        for name, work in (("commands", self._read), ("updates", self._send)):
            self._threads.append(threading.Thread(target=self._run, args=(work,), name=name, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def join(self) -> None:
        """Wait until both threads have ended, as they do when the other process has."""
        for thread in self._threads:
            thread.join()

    def tell(self, message: FromEngine) -> None:
        """Send the other process a message."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def note(self, one: "_Open", *, at_once: bool) -> None:
        """Something has come of a request, in the engine's thread."""
        with self._changed:
            noted = self._urgent if at_once else self._due
            if not noted:
                self._changed.notify_all()
            noted[one.number] = one

    def _run(self, work: Callable[[], None]) -> None:
        """Do the work of one of the threads, until the other process has ended: then nobody reads the answers."""
        try:
            work()
        except Exception as error:
            logger.error("the connection to another process cannot go on: %s", describe(error), exc_info=error)
            self.failure = error
        with self._changed:
            self._is_closed = True
            left = list(self._open.values())
            self._changed.notify_all()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        for one in left:
            one.request.cancel()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                return
            self._follow(message)

    def _follow(self, message: ToEngine) -> None:
        match message:
            case Submission(number, request) if request.params.grammar is not None:
                self._compiling.submit(self._submit, number, request)
            case Submission(number, request):
                self._submit(number, request)
            case Cancellation(number):
                with self._changed:
                    one = self._open.get(number)
                if one is not None:  # it may have ended
                    one.request.cancel()
            case Question(number, "stats"):
                self.tell(Reply(number, stats=self._engine.stats))
            case Question(number, "close"):
                threading.Thread(target=self._close, args=(number,), name="close", daemon=True).start()
            case Listening():
                self.listening.set()

    def _submit(self, number: int, command: NewRequest) -> None:
        try:
            request = self._engine.accept(command)
            one = _Open(self, number, request, at_end=not command.is_streamed)
            with self._changed:
                self._open[number] = one
                is_closed = self._is_closed
            request.tell(one)
            if is_closed:
                request.cancel()
        except Exception as error:
            self.tell(Reply(number, refusal=_sendable(error)))
        else:
            if command.params.grammar is not None:
                self.tell(Reply(number))

    def _close(self, number: int) -> None:
        self._engine.close()
        self.tell(Reply(number))

    def _send(self) -> None:
        next_due = 0.0  # when what nobody waits for may be sent
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_hurried or self._due)
                self._changed.wait_for(lambda: self._is_hurried, timeout=max(0.0, next_due - time.perf_counter()))
                if self._is_closed:
                    return
                messages, self._messages = self._messages, []
                noted, self._urgent = self._urgent, {}
                if is_due := time.perf_counter() >= next_due:
                    noted, self._due = self._due | noted, {}
            updates = [one.take() for one in noted.values()]
            try:
                self._connection.send([*updates, *messages])  # the last of all is that the engine has closed
            except OSError:
                return
            if is_due:
                next_due = time.perf_counter() + min(LONGEST_REST, REST * len(updates))
            self._sent(noted.values())

    def _sent(self, sent: Iterable["_Open"]) -> None:
        """Forget the requests whose end was among what was sent."""
        with self._changed:
            for one in sent:
                if one.is_over:
                    self._open.pop(one.number, None)
                    self._due.pop(one.number, None)

    @property
    def _is_hurried(self) -> bool:
        """Whether there is something that does not wait for what is due."""
        return bool(self._urgent or self._messages or self._is_closed)


class _Open:
    """A request, and how much of it has been sent. It listens to the request."""

    def __init__(self, host: EngineHost, number: int, request: Request, *, at_end: bool) -> None:
        self.number, self.request, self.at_end = number, request, at_end
        self.is_over = False  # whether its end has been sent
        self._host = host
        self._n_times = self._n_scores = 0

    def set(self, *, at_once: bool) -> None:
        """Something has come."""
        self._host.note(self, at_once=at_once)

    def take(self) -> Update:
        """What has come and was not sent."""
        request, partial = self.request, self.request.partial
        self.is_over = request.is_finished  # before the increments are taken
        increments, times, scores = request.take(), partial.times, partial.prompt_scores or []
        token_times, new_scores = times.tokens[self._n_times :], scores[self._n_scores :]
        self._n_times, self._n_scores = self._n_times + len(token_times), self._n_scores + len(new_scores)
        return Update(
            number=self.number,
            increments=increments,
            first_token=times.first_token,
            token_times=token_times,
            end=times.end,
            prompt_scores=new_scores,
            cached_tokens=partial.cached_tokens,
            errors={answer.index: answer.error for answer in partial.answers if answer.error is not None},
            failure=None if request.error is None else describe(request.error),
        )


def _sendable(error: Exception) -> Exception:
    """An error that another process can read: what is wrong with a request, or that the engine takes none."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    return EngineFailed(str(error)) if type(error) is RuntimeError else RuntimeError(describe(error))
