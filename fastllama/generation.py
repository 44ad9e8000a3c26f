"""Llama: generates text from prompts, with the interface of Meta's generation.py.

A call is check → encode → prefill → decode steps → decode. `text_completion` and `chat_completion` encode and decode
text. `generate` and `stream` run all prompts through the model in one ragged pass, then repeat the decode step until
every row has reached a stop token or its token budget. `generate` collects the tokens, `stream` yields them at once.
"""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastllama import memory_plan, validate
from fastllama.chat_format import Formatter, Llama3Format
from fastllama.decode_graph import Decoder
from fastllama.distributed import model_parallel
from fastllama.draft import choose_guesser
from fastllama.engine import Engine, Prompt, Result, SamplingParams
from fastllama.engine.engine import STEP_TOKENS
from fastllama.engine.many import in_order
from fastllama.engine.scoring import Score, score_documents, score_pairs
from fastllama.loading import AdapterFolders, choose_device, load
from fastllama.model import Transformer
from fastllama.predictions import ChatPrediction, CompletionPrediction, add_logprobs
from fastllama.sampling import sample_top_p
from fastllama.speculation_stats import SpeculationStats
from fastllama.stream import Increment, Request, checked_request, increments
from fastllama.tokenizer import Dialog, check_dialog
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.torch_settings import with_default_settings
from fastllama.warmup import warm_up

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "sample_top_p"]


class Llama:
    """A model with its tokenizer. Not re-entrant: one call, or one open stream, at a time."""

    @staticmethod
    @with_default_settings
    def build(
        ckpt_dir: str,
        tokenizer_path: str | None,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        cache_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str | None = None,
        quantize: str | None = None,
        rope_scaling_factor: float | None = None,
        adapter: AdapterFolders = None,
        chat_template: str | os.PathLike[str] | None = None,
        template_args: Mapping[str, Any] | None = None,
        graph_batch_sizes: Sequence[int] | None = None,
        cuda_graphs: bool | None = None,
        dependent_launch: bool | None = None,
        draft: str | os.PathLike[str] | None = None,
        speculate: str | None = None,
        n_guesses: int | str = "auto",
    ) -> "Llama":
        """Load a checkpoint, Meta's, Hugging Face's or GGUF, in any number of files, and compile all kernels.

        ckpt_dir: the checkpoint's folder, or a GGUF file. tokenizer_path: its tokenizer.model or tokenizer.json, a GGUF
        file, or a folder with one of them; None means the checkpoint's own. max_seq_len: positions per row, up to 8192,
        or 131072 if the checkpoint's rope is scaled. max_batch_size: rows of a batch. model_parallel_size: processes
        that share the model, independent of the number of files; None means all that torchrun started. Each process
        builds and makes the same calls. seed: the default seed of calls. cache_tokens: positions of all rows together,
        in pages of 64, so that many rows share fewer; None reserves max_seq_len for each row. device: None means CUDA
        if available, else the CPU. dtype: None means bfloat16 on CUDA (float16 if the GPU lacks it), float32 on a CPU.
        backend: "fused" (Triton kernels), "native" (C++ kernels) or "reference" (plain torch); None means fused on CUDA
        and native on a CPU. quantize: "int8", "fp8" or "int4" keeps the weights in fewer bits, rounded while they are
        read ("int4-g64" and "int4-g32" in smaller groups); None keeps them as the files have them. rope_scaling_factor:
        replaces the checkpoint's or inferred factor, and turns Llama 3.1's scaled rope on. adapter: the folder of a
        LoRA adapter, or a list of folders, merged into the weights in this order while they are read. chat_template:
        the path of a chat template, the name of one in the checkpoint's folder, or "llama3"; None means the
        checkpoint's own, and Llama 3's format in Meta's layout. template_args: variables for it, such as a date.
        graph_batch_sizes: numbers of rows whose decode step is captured as a graph during build, not in the first call
        that needs it; None means 1 and max_batch_size. cuda_graphs: False launches every kernel of every step by
        itself. dependent_launch: False starts each kernel after the previous one has ended; None lets it start earlier
        (programmatic dependent launch) from compute capability 9.0. These two are for debugging: False costs speed, and
        no token changes. speculate: "lookup" or "draft" guesses the next tokens and checks them in one decode step, for
        the same answers in fewer steps: what followed the newest tokens earlier in prompt and answer, or what a draft
        model draws. draft: that model's checkpoint, a smaller one with the same vocabulary. n_guesses: guesses in a
        step, 1 to 15; "auto" follows how many were right lately, and what steps cost.

        Raises AssertionError where Meta's build does (max_seq_len out of range, no checkpoint folder, tokenizer file or
        weights, a tokenizer with another vocabulary), ValueError for any other error in the arguments or the files, and
        DoesNotFit (a MemoryError), naming sizes that would fit, if there is not enough memory.
        """
        seed = validate.seed(seed)
        max_batch_size = validate.whole_number("max_batch_size", max_batch_size, 1)
        if cache_tokens is not None:
            cache_tokens = validate.whole_number("cache_tokens", cache_tokens, 1)
        batch_sizes = validate.batch_sizes(graph_batch_sizes, max_batch_size)
        validate.launches(cuda_graphs, dependent_launch, choose_device(device).type)
        kind, most_guesses = validate.speculation(speculate, n_guesses, draft is not None)
        loaded = load(
            ckpt_dir,
            tokenizer_path,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            cache_tokens=cache_tokens,
            model_parallel_size=model_parallel_size,
            device=device,
            dtype=dtype,
            backend=backend,
            quantize=quantize,
            rope_scaling_factor=rope_scaling_factor,
            adapter=adapter,
            chat_template=chat_template,
            template_args=template_args,
            draft=draft,
            n_guesses=most_guesses if kind else 0,
        )
        llm = Llama(loaded.model, loaded.tokenizer, seed=seed, formatter=loaded.formatter)
        options: dict[str, Any] = {"graphs": cuda_graphs, "dependent": dependent_launch, "n_guesses": most_guesses}
        llm.decoder = Decoder(loaded.model, guesser=choose_guesser(kind, loaded.model, loaded.draft), **options)
        with memory_plan.explain_out_of_memory(loaded.model.device):
            warm_up(llm.decoder, batch_sizes, progress=None if model_parallel.is_first_process() else False)
        return llm

    def __init__(
        self, model: Transformer, tokenizer: BaseTokenizer, *, seed: int = 1, formatter: Formatter | None = None
    ) -> None:
        """Combine a model with its tokenizer. seed: the default seed of calls. formatter: None means Llama 3's."""
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = formatter or Llama3Format(tokenizer)
        self.decoder = Decoder(model)
        self._seed = validate.seed(seed)
        self._calls = itertools.count(1)

    @with_default_settings  # once for the whole call, not at every step as in `stream`
    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue every prompt until a stop token, max_gen_len tokens or max_seq_len positions.

        The arguments are those of `stream`. Returns each row's tokens, without the stop token, and their
        log-probabilities if requested, else None.
        """
        request = self._request(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, seed)
        out_tokens: list[list[int]] = [[] for _ in request.prompts]
        out_logprobs: list[list[float]] = [[] for _ in request.prompts]
        for increment in self._increments(request, None):
            out_tokens[increment.row].extend(increment.tokens)
            out_logprobs[increment.row].extend(increment.logprobs or ())
        return out_tokens, out_logprobs if request.logprobs else None

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
        reuse_prefix: bool = False,
    ) -> Generator[Increment]:
        """Generate like `generate`, and yield each row's new tokens step by step. It may be closed early.

        prompt_tokens: at most max_batch_size prompts of 1 to max_seq_len token ids. max_gen_len: the most tokens that a
        row generates. temperature: 0 takes the most likely token. top_p: draw from the smallest set of tokens with this
        probability mass; 0 takes the most likely token, 1 keeps all. logprobs: return the tokens' log-probabilities,
        before temperature and top-p. echo: return the prompts' tokens first, cut at the first stop token. seed: an int
        makes draws repeatable, row i using its i-th random stream; a list has one seed per row, which draws the same in
        any batch; None continues from the seed given to build. reuse_prefix: what a prompt has in common with an
        earlier one, in complete pages of the cache, is not computed again.

        Raises AssertionError for too many or too long prompts, ValueError for other wrong arguments and for logits that
        are not finite, RuntimeError while another call or stream is running.
        """
        call = (prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, seed)
        return self._stream(self._request(*call, reuse_prefix=reuse_prefix))

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> list[CompletionPrediction]:
        """Continue texts. max_gen_len None means max_seq_len - 1; the other arguments are those of `stream`."""
        prompts = validate.texts(prompts)
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        tokens, scores = self.generate(
            prompt_tokens, self._max_gen_len(max_gen_len), temperature, top_p, logprobs, echo, seed=seed
        )
        texts = [CompletionPrediction(generation=self.tokenizer.decode(row)) for row in tokens]
        add_logprobs(texts, self.tokenizer, tokens, scores)
        return texts

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> list[ChatPrediction]:
        """Answer dialogs. max_gen_len None means max_seq_len - 1; the other arguments are those of `stream`."""
        for index, dialog in enumerate(dialogs := validate.dialogs(dialogs)):
            check_dialog(dialog, f"dialog {index}")
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        tokens, scores = self.generate(
            prompt_tokens, self._max_gen_len(max_gen_len), temperature, top_p, logprobs, seed=seed
        )
        answers = [
            ChatPrediction(generation={"role": "assistant", "content": self.tokenizer.decode(row)}) for row in tokens
        ]
        add_logprobs(answers, self.tokenizer, tokens, scores)
        return answers

    @property
    def speculation(self) -> SpeculationStats | None:
        """What speculation did so far, of all calls; None for a model that checks no guesses."""
        return None if self.decoder.guesser is None else replace(self.decoder.control.stats)

    def engine(self, *, max_tokens_per_step: int = STEP_TOKENS, reuse_prefixes: bool = True) -> Engine:
        """An engine of requests on this model. The arguments are those of `Engine`."""
        return Engine(self, max_tokens_per_step=max_tokens_per_step, reuse_prefixes=reuse_prefixes)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> Iterator[Result]:
        """Answer any number of prompts, and yield the results in order as soon as they are there.

        prompts: texts, token ids or dialogs; of an iterator only a few are read ahead. params: of all prompts, or one
        for each. progress: whether to show a bar on stderr; None shows it on a terminal only. Raises ValueError, naming
        the prompt, for one that does not fit.
        """
        return in_order(self.engine(), prompts, params, progress)

    def score(self, pairs: Iterable[tuple[Prompt, Prompt]], *, progress: bool | None = None) -> list[Score]:
        """The log-probability of each continuation after its context, token by token: [(context, continuation), ...].

        Texts or token ids. Contexts that begin alike are computed once; an empty one stands for the begin of a text.
        Raises ValueError for pairs that do not fit the context of the model.
        """
        return score_pairs(self.engine(), pairs, progress)

    def score_documents(
        self, documents: Iterable[Prompt], *, stride: int | None = None, progress: bool | None = None
    ) -> list[Score]:
        """The log-probability of every token of each document, in windows of max_seq_len tokens.

        stride: tokens that each window scores, after as many before them as fit; None means complete windows, each but
        the last after one token of the one before.
        """
        return score_documents(self.engine(), documents, stride, progress)

    def _max_gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len

    @with_default_settings
    def _request(self, *arguments: Any, reuse_prefix: bool = False) -> Request:
        """Check a call's arguments, and that no other call is running -> the request."""
        return checked_request(self.model, self.tokenizer, self.random_streams, *arguments, reuse_prefix=reuse_prefix)

    def random_streams(self, seeds: list[int] | int | None, n_rows: int) -> list[tuple[int, int, int]]:
        """The random stream of every row of a call, as (seed, stream, call)."""
        if isinstance(seeds, list):
            return [(seed, 0, 0) for seed in seeds]
        seed, call = (self._seed, next(self._calls)) if seeds is None else (seeds, 0)
        return [(seed, row, call) for row in range(n_rows)]

    @with_default_settings
    def _stream(self, request: Request) -> Generator[Increment]:
        yield from self._increments(request, self.tokenizer)

    def _increments(self, request: Request, tokenizer: BaseTokenizer | None) -> Generator[Increment]:
        with self.model.exclusively(), memory_plan.explain_out_of_memory(self.model.device):
            yield from increments(self.decoder, request, tokenizer)
