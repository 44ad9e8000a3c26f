"""The engine: answers any number of requests at once, with rows that join and leave between decode steps.

    engine = llm.engine()
    request = engine.submit("Once upon a time", SamplingParams(max_gen_len=64))
    for increment in request: ...       # or request.result()

A step computes a chunk of waiting prompts and one token of every running answer. `step` runs one step; iterating over a
request does so until the request has something new. Or `start` runs steps in a thread, and requests may be submitted,
read and cancelled from any thread and from asyncio.
"""

import itertools
import threading
from collections.abc import Sequence as Items
from contextlib import ExitStack
from typing import NamedTuple, Protocol, cast

import torch

from fastllama import memory_plan, validate
from fastllama.chat_format import Formatter
from fastllama.decode_graph import Decoder
from fastllama.engine.core import EngineCore
from fastllama.engine.grammar_matcher import GrammarMatcher, grammar_matcher
from fastllama.engine.request import Request
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.sequence import Sequence
from fastllama.model import Transformer
from fastllama.prefill import PREFILL_CHUNK_TOKENS
from fastllama.tokenizer import Dialog, check_dialog
from fastllama.tokenizer_base import BaseTokenizer, TextStream
from fastllama.torch_settings import default_settings

STEP_TOKENS = 512  # of prompts, in a step beside running answers, which wait for them

Prompt = str | Items[int] | Dialog


class Model(Protocol):
    """What the engine needs of a Llama."""

    model: Transformer
    tokenizer: BaseTokenizer
    formatter: Formatter
    decoder: Decoder

    def random_streams(self, seeds: int | None, n_rows: int) -> list[tuple[int, int, int]]:
        """The random streams of a request's answers."""


class Stats(NamedTuple):
    """What the engine holds, and has done since it was made."""

    running: int  # answers that have a row
    waiting: int  # answers that wait for a row or for pages
    used_pages: int  # pages that running answers hold
    pages: int
    finished_requests: int
    cached_tokens: int  # of prompts, that were found in the cache
    preemptions: int  # answers that gave their pages back and were computed again


class Engine:
    """Runs requests on a Llama. While it has requests, no other call may use the model."""

    def __init__(self, llm: Model, *, max_tokens_per_step: int = STEP_TOKENS, reuse_prefixes: bool = True) -> None:
        """Make an engine; nothing runs yet.

        max_tokens_per_step: of prompts, computed in one step while answers are running, which wait for them. While none
        are, a step computes up to 2048, which is the most here, too. reuse_prefixes: prompts that begin alike share the
        pages of what they have in common.
        """
        self.llm = llm
        step_tokens = validate.whole_number("max_tokens_per_step", max_tokens_per_step, 1, PREFILL_CHUNK_TOKENS)
        self._core = EngineCore(
            llm.decoder, step_tokens, reuses_prefixes=validate.flag("reuse_prefixes", reuse_prefixes)
        )
        self._numbers, self._arrivals = itertools.count(1), itertools.count()
        self._held: ExitStack | None = None  # the model, while there are requests
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._turnstile = threading.Lock()  # the thread passes it before a step, so that callers get their turn
        self._thread: threading.Thread | None = None
        self._closing = False

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        first_scored: int = 1,
        alternatives: Items[int] = (),
    ) -> Request:
        """Submit a prompt (a text, token ids, or a dialog) -> its handle. It runs when steps run.

        first_scored: the position of the first token whose log-probability is wanted, with prompt_logprobs.
        alternatives: tokens that are scored, too, in place of the prompt's last one: after its scores. Raises
        ValueError for a prompt that does not fit, and RuntimeError while another call uses the model.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {validate.kind(params)}")
        tokens = self.encode(prompt, spare=params.max_gen_len == 0)
        params.check_vocabulary(self.llm.model.vocab_size)
        first_scored = validate.whole_number("first_scored", first_scored, 1, max(1, len(tokens)))
        if params.echo and first_scored > 1:
            raise ValueError(f"echo needs the scores of all tokens, and first_scored is {first_scored}: leave one out")
        alternatives = self.checked(alternatives) if alternatives else ()
        matcher = self._matcher(params)  # which takes time: before the locks
        with self._turnstile, self._work:
            if self._closing:
                raise RuntimeError("the engine is closed: make another")
            self._hold_model()
            try:
                request = self._new_request(tokens, params, first_scored, tuple(alternatives), matcher)
                self._core.add(request)
            finally:
                self._release_model_if_idle()
            self._work.notify_all()
        return request

    def encode(self, prompt: Prompt, spare: int = 0) -> list[int]:
        """The token ids of a prompt. Raises ValueError if it is empty, too long, or has ids outside the vocabulary.

        spare: tokens beyond the model's context that it may have. The last one, if it is only scored, needs no place.
        """
        llm = self.llm
        if isinstance(prompt, str):
            prompt = llm.tokenizer.encode(prompt, bos=True, eos=False)
        elif isinstance(prompt, list | tuple) and prompt and all(isinstance(message, dict) for message in prompt):
            check_dialog(prompt, "the prompt")
            prompt = llm.formatter.encode_dialog_prompt(prompt)
        return self.checked(cast(Items[int], prompt), spare)

    def checked(self, prompt: Items[int], spare: int = 0) -> list[int]:
        """Token ids as a list. Raises as `encode`."""
        model = self.llm.model
        sizes = {"vocab_size": model.vocab_size, "max_seq_len": model.params.max_seq_len + spare}
        try:
            return validate.prompts([prompt], max_batch_size=1, **sizes)[0]
        except (AssertionError, ValueError) as error:  # the first is Meta's type for a long prompt
            raise ValueError(str(error).replace("prompt 0", "the prompt")) from None

    def step(self) -> bool:
        """Run one step -> whether there are unfinished requests."""
        with self._lock, default_settings(), torch.inference_mode():
            if not self._core.requests:
                return False
            try:
                with memory_plan.explain_out_of_memory(self.llm.model.device):
                    self._core.step()
            except BaseException as error:
                stopped = RuntimeError(f"the engine was stopped by {error!r}")
                self._core.fail(error if isinstance(error, Exception) else stopped)
                raise
            finally:
                self._release_model_if_idle()
            return bool(self._core.requests)

    def run(self) -> None:
        """Run steps until all requests have ended."""
        while self.step():
            pass

    def cancel(self, request: Request) -> None:
        """End the answers of a request that have not ended."""
        with self._turnstile, self._lock, default_settings(), torch.inference_mode():
            for sequence in request.sequences:
                if sequence in self._core.requests:
                    self._core.end(sequence, "cancelled")
            self._release_model_if_idle()

    @property
    def stats(self) -> Stats:
        """What the engine holds, and has done."""
        with self._lock:
            core, scheduler = self._core, self._core.scheduler
            used = len({page for one in scheduler.running for page in one.pages})
            counts = core.n_finished, core.n_cached_tokens, core.n_preemptions
            return Stats(len(scheduler.running), len(scheduler.waiting), used, scheduler.pool.n_pages, *counts)

    @property
    def has_thread(self) -> bool:
        """Whether steps run in the engine's own thread."""
        return self._thread is not None

    def start(self) -> "Engine":
        """Run steps in a thread of the engine's own from now on, whenever there are requests -> the engine."""
        with self._lock:
            if self._closing:
                raise RuntimeError("the engine is closed: make another")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_thread, name="fastllama engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._work:
            self._closing = True
            requests = set(self._core.requests.values())
        for request in requests:
            self.cancel(request)
        with self._work:
            self._work.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run_thread(self) -> None:
        while True:
            with self._turnstile:
                pass
            with self._work:
                self._work.wait_for(lambda: self._core.requests or self._closing)
                if self._closing:
                    return
            try:
                self.step()
            except Exception:  # the requests have it
                continue

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a request's answers."""
        llm = self.llm
        stops = frozenset() if params.ignore_eos else validate.stop_ids(llm.tokenizer.stop_tokens, llm.model.vocab_size)
        return stops | set(params.stop_token_ids)

    def _matcher(self, params: SamplingParams) -> GrammarMatcher | None:
        """The matcher of a request's grammar, at the beginning."""
        if params.grammar is None:
            return None
        llm, stop_ids = self.llm, self._stop_ids(params)
        return grammar_matcher(params.grammar, llm.tokenizer, llm.model.vocab_size, stop_ids, params.min_tokens)

    def _new_request(
        self,
        tokens: list[int],
        params: SamplingParams,
        first_scored: int,
        alternatives: tuple[int, ...],
        matcher: GrammarMatcher | None,
    ) -> Request:
        llm, number = self.llm, next(self._numbers)
        room = max(0, llm.model.params.max_seq_len - len(tokens))
        budget = room if params.max_gen_len is None else min(params.max_gen_len, room)
        scored = params.prompt_logprobs is not None or (params.echo and params.logprobs is not None)
        sequences: list[Sequence] = []
        for index, stream in enumerate(llm.random_streams(params.seed, params.n)):
            sequence = Sequence(
                arrival=next(self._arrivals),
                index=index,
                params=params,
                tokens=list(tokens),
                n_prompt=len(tokens),
                last=len(tokens) - 1 + budget,
                stream=stream,
                stop_ids=self._stop_ids(params),
                # A grammar tells whether the text begins with a space.
                text=TextStream(llm.tokenizer, strips_space=matcher is None or params.echo),
                first_scored=first_scored if scored and index == 0 else None,  # the other answers find its pages
                alternatives=alternatives,
                n_top_scored=max(params.prompt_logprobs or 0, params.logprobs or 0 if params.echo else 0),
                matcher=matcher and matcher.copy(),
            )
            sequences.append(sequence)
        return Request(self, number, params, sequences)

    def _hold_model(self) -> None:
        """Take the model for the first of several requests. RuntimeError while another call uses it."""
        if self._held is not None:
            return
        with ExitStack() as stack, default_settings(), torch.inference_mode():
            stack.enter_context(self.llm.model.exclusively())
            self._core.begin()
            self._held = stack.pop_all()

    def _release_model_if_idle(self) -> None:
        if not self._core.requests and self._held is not None:
            self._held.close()
            self._held = None
