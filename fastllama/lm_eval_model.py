"""The model `fastllama` of EleutherAI's lm-evaluation-harness. See docs/evaluation.md.

    lm_eval --model fastllama --model_args pretrained=FOLDER --tasks ...
    python -m fastllama.lm_eval_model --model fastllama ...     # up to lm-eval 0.4.13, which finds no other packages

`pretrained` is the folder of a checkpoint or a GGUF file, `tokenizer` its tokenizer; `max_length` the longest prompt
with its answer. All other arguments are those of `Llama.build`.
"""

import inspect
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from fastllama.builtin import builtin_checkpoint
from fastllama.chat_format import TemplateFormat
from fastllama.engine.scoring import document_windows, score_token_pairs
from fastllama.evaluation import (
    MAX_GEN_TOKS,
    answer_text,
    encode,
    render_chat,
    sampling_params,
    stated_context,
)
from fastllama.generation import Llama
from fastllama.tokenizer import Message

try:
    import lm_eval.models  # noqa: F401 - the harness registers its own only while nobody else has
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lm-evaluation-harness is not installed: pip install 'fastllama[eval]'", name=error.name
    ) from error

logger = logging.getLogger(__name__)

AUTO_ROWS = 32  # of batch_size "auto"
ROW_TOKENS = 1024  # positions of the cache per row, unless cache_tokens says otherwise
BUILD_ARGUMENTS = set(inspect.signature(Llama.build).parameters)
OWN_NAMES = {"ckpt_dir": "pretrained", "tokenizer_path": "tokenizer", "max_seq_len": "max_length"}  # as in `hf`

Arguments = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts for the harness's cache, and their ids


def _cut(context: list[int], continuation: list[int], most: int) -> tuple[list[int], list[int]]:
    """The last `most` tokens of both, of which the first is context."""
    together = [*context, *continuation][-most:]
    n_context = max(1, len(together) - len(continuation))
    return together[:n_context], together[n_context:]


@register_model("fastllama")
class FastLlama(TemplateLM):
    """A Llama that the harness can evaluate."""

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Llama | None = None,
        tokenizer: str | None = None,
        *,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **build: Any,
    ) -> None:
        """Build the model.

        pretrained: a checkpoint's folder, a GGUF file, or a Llama; None means the built-in model. max_length: None
        means the context that the checkpoint states, at most 8192. batch_size: rows that run at the same time; "auto"
        means max_batch_size, or 32. add_bos_token: whether prompts begin with the begin of a text; None leaves it to
        the tokenizer. prefix_token_id: the token before a document, and before an answer without a context; None means
        the begin of a text, or the end of one. think_end_token: the text after which an answer begins. enable_thinking,
        chat_template_args: variables of the chat template. build: the other arguments of Llama.build.
        """
        super().__init__()
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if variables := {**(chat_template_args or {}), **thinking, **(build.pop("template_args", None) or {})}:
            build["template_args"] = variables
        if isinstance(pretrained, Llama):
            self.llm, self.name = pretrained, "Llama"
        else:
            rows = max_batch_size or AUTO_ROWS if str(batch_size).startswith("auto") else int(batch_size)
            build["dtype"] = None if dtype == "auto" else dtype
            self.llm = _build(pretrained, tokenizer, max_length, rows, build)
            self.name = str(pretrained or "builtin")
        most = self.llm.model.params.max_seq_len
        if max_length is not None and max_length > most:
            raise ValueError(f"max_length must be at most the Llama's max_seq_len, {most}, got {max_length}")
        self.max_length = max_length or most
        self.max_gen_toks = MAX_GEN_TOKS
        self.batch_size = self.llm.model.params.max_batch_size
        self._add_bos, self._prefix, self._think_end = add_bos_token, prefix_token_id, think_end_token

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a document, and before an answer without a context."""
        if self._prefix is not None:
            return self._prefix
        begin = self.llm.tokenizer.bos_id
        return begin if begin >= 0 else self.eot_token_id

    @property
    def device(self) -> Any:
        """The device of the model."""
        return self.llm.model.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; None begins it as the tokenizer does, unless it begins so already."""
        first = self.llm.tokenizer.decode([self.prefix_token_id])
        return encode(self.llm.tokenizer, string, begins=add_special_tokens, add_bos=self._add_bos, first=first)

    def _loglikelihood_tokens(
        self, requests: Iterable[Arguments], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        requests = list(requests)
        most = self.max_length + 1  # the last token is predicted, and not fed
        self._warn_of_cuts((len(one[1]) + len(one[2]) for one in requests), most, "contexts with their answers")
        pairs = [_cut(one[1], one[2], most) for one in requests]
        scores = score_token_pairs(self.llm.engine(), pairs, progress=False if disable_tqdm else None)
        results = [(score.total, score.is_greedy) for score in scores]
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _warn_of_cuts(self, lengths: Iterable[int], most: int, what: str) -> None:
        """Say once how many texts do not fit. As with `hf`, their first tokens are left out."""
        if cut := [length for length in lengths if length > most]:
            logger.warning(
                "%d %s exceed max_length=%d, the longest with %d tokens where %d fit: their first tokens are left out",
                *(len(cut), what, self.max_length, max(cut), most),
            )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each document, in windows of max_length tokens."""
        texts = [request.args[0] for request in requests]
        first, most = self.prefix_token_id, self.max_length
        documents = [list(document_windows([first, *self.tok_encode(text)], most)) for text in texts]
        windows: list[Arguments] = [(None, *window) for document in documents for window in document]
        found = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(found)[0] for _ in document) for document in documents]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of its stop strings."""
        tokenizer = self.llm.tokenizer
        end_name = tokenizer.decode([self.eot_token_id]) if self.eot_token_id >= 0 else ""
        asked = [sampling_params(request.args[1], end_name, self.max_gen_toks) for request in requests]
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        rooms = [self._room(params.max_gen_len or 0) for params, _ in asked]
        self._warn_of_cuts(map(len, prompts), min(rooms, default=0), "prompts")
        prompts = [prompt[-room:] for prompt, room in zip(prompts, rooms, strict=True)]
        # Long prompts first: so memory that does not suffice shows at once. Equal beginnings follow each other.
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
        results = self.llm.generate_many(
            [prompts[index] for index in order],
            [asked[index][0] for index in order],
            progress=False if disable_tqdm else None,
        )
        texts = [""] * len(requests)
        for index, result in zip(order, results, strict=True):
            if (error := result.answer.error) is not None:
                raise ValueError(error)
            stops = asked[index][1]
            texts[index] = answer_text(tokenizer, result.answer.tokens, result.answer.text, stops, self._think_end)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _room(self, n_answer: int) -> int:
        """The most tokens of a prompt, beside an answer of n_answer. ValueError if there is no room."""
        room = self.max_length - n_answer
        if room <= 0:
            raise ValueError(
                f"an answer of max_gen_toks={n_answer} tokens leaves no room for a prompt in max_length="
                f"{self.max_length}: raise max_length, or lower max_gen_toks in the task or with --gen_kwargs"
            )
        return room

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt. A template that refuses system messages gets none."""
        try:
            return render_chat(self.llm.formatter, chat_history, adds_prompt=add_generation_prompt)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history) or not isinstance(self.llm.formatter, TemplateFormat):
                raise
            logger.warning("system messages are left out: %s", error)
            return render_chat(self.llm.formatter, others, adds_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, for the harness's records. It is chosen when the model is built."""
        if isinstance(chat_template, str):
            logger.warning("--apply_chat_template %s: choose it in model_args, as chat_template=", chat_template)
        if not chat_template:
            return None
        formatter = self.llm.formatter
        return formatter.template.source if isinstance(formatter, TemplateFormat) else formatter.name

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer and the chat format, for the names of the harness's caches of requests."""
        return f"{self.name}__{self.llm.formatter.name}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        model = self.llm.model
        return {
            "model_num_parameters": sum(math.prod(shape) for shape in model.params.shapes.values()),
            "model_dtype": str(model.dtype),
        }


def _build(
    pretrained: str | os.PathLike[str] | None,
    tokenizer: str | None,
    max_length: int | None,
    rows: int,
    build: dict[str, Any],
) -> Llama:
    """The Llama of these arguments. Raises ValueError for names that are not known."""
    for name in build:
        if name in OWN_NAMES:
            raise ValueError(f"{name} is called {OWN_NAMES[name]} here, as in the harness's own models")
        if name not in BUILD_ARGUMENTS:
            known = ["pretrained", "tokenizer", "max_length", *sorted(BUILD_ARGUMENTS - set(OWN_NAMES))]
            raise ValueError(f"model_args has {name}, which is not known: expected {', '.join(known)}")
    folder = os.fspath(pretrained) if pretrained is not None else None
    if folder is None:
        folder, own_tokenizer = builtin_checkpoint()
        tokenizer = tokenizer or own_tokenizer
    length = max_length or stated_context(folder)
    return Llama.build(
        folder,
        tokenizer,
        max_seq_len=length,
        max_batch_size=rows,
        **{"cache_tokens": min(rows * length, max(length, rows * ROW_TOKENS)), **build},
    )


def main() -> None:
    """Run the harness's own command, which then knows this model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
