"""An engine in another process, as one that submits requests to it sees it.

The requests of many clients, their texts and their connections take time of the interpreter. In the engine's process
its thread would wait for that between two launches. So a server has a process of its own for them, which has
everything but the model. `engine_host.py` is the other end of the connection.
"""

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection

from fastllama.engine.any_engine import AnyEngine, EngineFailed
from fastllama.engine.commands import Cancellation, NewRequest
from fastllama.engine.facts import Facts
from fastllama.engine.messages import Failure, FromEngine, Question, Reply, Stop, Subject, Submission, ToEngine, Update
from fastllama.engine.recovery import describe
from fastllama.engine.request import Request
from fastllama.engine.stats import Stats

logger = logging.getLogger(__name__)
GONE = "the engine's process has ended"


class RemoteEngine(AnyEngine):
    """Submits requests to an engine in another process. A thread of its own takes in what comes of them."""

    def __init__(self, connection: Connection, facts: Facts) -> None:
        """facts: those of the engine."""
        self._connection, self._facts = connection, facts
        self.on_stop: Callable[[bool], None] = lambda at_once: None  # called when the engine's process says so
        self.has_lost_engine = False  # its process has ended without a word
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of all below
        self._requests: dict[int, Request] = {}  # that have not ended
        self._asked: dict[int, Future[Stats | None]] = {}  # what waits for a reply
        self._is_closed = False
        self._sending = threading.Lock()

    @property
    def facts(self) -> Facts:
        """What requests are checked against."""
        return self._facts

    @property
    def stats(self) -> Stats:
        """What the engine holds, and has done. Asks it, and waits for the reply. Raises EngineFailed if it is gone."""
        stats = self._ask("stats")
        if stats is None:
            raise RuntimeError("the engine has replied without its numbers")
        return stats

    @property
    def has_thread(self) -> bool:
        """Whether steps run without the caller's doing: they do."""
        return True

    def start(self) -> "RemoteEngine":
        """Take in what comes, from now on -> the engine."""
        threading.Thread(target=self._read, name="replies", daemon=True).start()
        return self

    def accept(self, command: NewRequest) -> Request:
        """A checked request -> its handle. Waits for the engine if there is a grammar, which it may refuse."""
        number = next(self._numbers)
        request, reply = Request(self, command._replace(number=number)), None
        with self._lock:
            if self._is_closed or self.failure is not None:
                raise EngineFailed("the engine is closed" if self.failure is None else str(self.failure))
            self._requests[number] = request
            if command.params.grammar is not None:
                reply = self._asked[number] = Future()
        try:
            self.tell(Submission(number, command))
        except BaseException:
            with self._lock:
                self._requests.pop(number, None)
                self._asked.pop(number, None)
            raise
        if reply is not None:
            reply.result()
        return request

    def step(self) -> bool:
        """Steps run in the engine's process."""
        return False

    def cancel(self, request: Request) -> None:
        """End the answers of a request that have not ended. Its reader learns it from the last increment."""
        if not request.is_finished:
            self.tell(Cancellation(request.number))

    def close(self) -> None:
        """Let the engine cancel all requests and end, and wait until it has. Nothing if it has failed."""
        with self._lock:
            self._is_closed = True
        with suppress(RuntimeError):
            self._ask("close")

    def tell(self, message: ToEngine) -> None:
        """Send the engine's process a message. Nothing if it has ended: the other thread finds that, too."""
        with self._sending, suppress(OSError):
            self._connection.send(message)

    def _ask(self, subject: Subject) -> Stats | None:
        reply: Future[Stats | None] = Future()
        question = Question(next(self._numbers), subject)
        with self._lock:
            if self.failure is not None:
                raise EngineFailed(str(self.failure))
            self._asked[question.number] = reply
        self.tell(question)
        return reply.result()

    def _read(self) -> None:
        try:
            while True:
                for message in self._connection.recv():
                    self._take(message)
        except (EOFError, OSError):
            self.has_lost_engine = True
            self._fail(EngineFailed(GONE))
        except Exception as error:
            logger.error("what the engine sends cannot be read: %s", describe(error), exc_info=error)
            self._fail(EngineFailed(describe(error)))

    def _take(self, message: FromEngine) -> None:
        match message:
            case Update():
                self._update(message)
            case Reply():
                self._reply(message)
            case Failure(reason):
                self._fail(EngineFailed(reason))
            case Stop(at_once):
                self.on_stop(at_once)

    def _update(self, update: Update) -> None:
        request = self._requests.get(update.number)
        if request is None:  # it has failed
            return
        request.receive(update)
        if update.failure is not None:
            request.fail(EngineFailed(update.failure))
        if request.is_finished:
            with self._lock:
                self._requests.pop(update.number, None)

    def _reply(self, reply: Reply) -> None:
        with self._lock:
            asked = self._asked.pop(reply.number, None)
            refused = None if reply.refusal is None else self._requests.pop(reply.number, None)
        if reply.refusal is None and asked is not None:
            asked.set_result(reply.stats)
        elif reply.refusal is not None and asked is not None:
            asked.set_exception(reply.refusal)
        elif reply.refusal is not None and refused is not None:  # whoever reads it learns it
            refused.fail(reply.refusal)

    def _fail(self, error: EngineFailed) -> None:
        """The engine has failed, or its process is gone: whoever waits for something learns it."""
        with self._lock:
            self.failure = self.failure or error
            requests, self._requests = self._requests, {}
            asked, self._asked = self._asked, {}
        for request in requests.values():
            request.fail(error)
        for reply in asked.values():
            reply.set_exception(error)
