"""What those who submit requests use: an engine of this process, or of another one (`remote_engine.py`)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from typing import Self

from fastllama.engine import prompts
from fastllama.engine.commands import NewRequest
from fastllama.engine.facts import Facts
from fastllama.engine.prompts import Prompt
from fastllama.engine.request import Request
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.stats import Stats


class EngineFailed(RuntimeError):
    """The engine has failed, and all requests with it, or it is closed."""


class AnyEngine(ABC):
    """Runs requests. All calls may come from any thread, and none but `close` waits for a step."""

    failure: BaseException | None = None  # that has ended all requests; None while the engine works

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What requests are checked against."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """What the engine holds, and has done."""

    @property
    @abstractmethod
    def has_thread(self) -> bool:
        """Whether steps run without the caller's doing."""

    @abstractmethod
    def accept(self, command: NewRequest) -> Request:
        """A checked request -> its handle."""

    @abstractmethod
    def step(self) -> bool:
        """Run one step -> whether there are unfinished requests."""

    @abstractmethod
    def cancel(self, request: Request) -> None:
        """End the answers of a request that have not ended. Its reader learns it from the last increment."""

    @abstractmethod
    def close(self) -> None:
        """Cancel all requests, and take no more."""

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        first_scored: int = 1,
        alternatives: Items[int] = (),
        is_streamed: bool = True,
    ) -> Request:
        """Submit a prompt (a text, token ids, or a dialog) -> its handle. It runs when steps run.

        first_scored: the position of the first token whose log-probability is wanted, with prompt_logprobs.
        alternatives: tokens that are scored, too, in place of the prompt's last one: after its scores. is_streamed:
        whether increments are read as they come; False lets another process send them when an answer ends. Raises
        ValueError for a prompt that does not fit, and RuntimeError while another call uses the model, and after the
        engine was closed or has failed.
        """
        command = prompts.checked_request(self.facts, prompt, params, first_scored, alternatives)
        return self.accept(command._replace(is_streamed=is_streamed))

    def encode(self, prompt: Prompt, spare: int = 0) -> list[int]:
        """The token ids of a prompt. Raises ValueError if it is empty, too long, or has ids outside the vocabulary.

        spare: tokens beyond the model's context that it may have. The last one, if it is only scored, needs no place.
        """
        return prompts.encode(self.facts, prompt, spare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
