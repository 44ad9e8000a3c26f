"""What lm-evaluation-harness asks of a model, in the terms of the engine. Needs no lm_eval itself.

A result must equal that of the harness's own `hf` model on the same checkpoint. So texts are encoded, cut and decoded
as there, where Llama's own methods differ: the names of special tokens in a prompt are special, for example, because
a rendered chat template has them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllama.chat_format import Formatter, NoFormat, TemplateFormat
from fastllama.checkpoint.gguf_rope import CONTEXT_LENGTH
from fastllama.engine.sampling_params import SamplingParams
from fastllama.gguf_header import gguf_models, is_gguf_file, read_header
from fastllama.loading import MAX_SEQ_LEN
from fastllama.tokenizer import Message
from fastllama.tokenizer_base import BaseTokenizer

MAX_GEN_TOKS = 256  # where a task states none
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting; first wins
PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
# Settings of transformers' generate, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True, False),
    "top_p": (None,),
    "top_k": (None,),
    "min_p": (None,),
    "repetition_penalty": (None,),
}
MARK = "\ue0ff"  # a private-use character, where a message goes on


def stated_context(ckpt_dir: str) -> int:
    """The positions that a checkpoint says it was trained for, at most those that Llama.build takes without asking."""
    path, stated = Path(ckpt_dir), None
    if (config := path / "config.json").is_file():
        stated = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    elif files := gguf_models(path) if path.is_dir() else [path] if is_gguf_file(path) else []:
        stated = read_header(files[0]).metadata.get(CONTEXT_LENGTH)
    return min(stated, MAX_SEQ_LEN) if isinstance(stated, int) and stated > 0 else MAX_SEQ_LEN


def encode(
    tokenizer: BaseTokenizer, text: str, *, begins: bool | None = None, add_bos: bool | None = None, first: str = ""
) -> list[int]:
    """The ids of a prompt, with the names of special tokens read as such.

    begins: whether the tokens before a text are added; None adds them unless it spells `first`, the first of them, out.
    add_bos: whether those are the begin of a text (True), nothing (False), or what the tokenizer says (None).
    """
    if begins is None:
        begins = not (first and text.startswith(first))
    tokens = tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    if not begins or add_bos is False:
        return tokens
    usual = tokenizer.encode("", bos=True, eos=False)
    return [*(usual or ([tokenizer.bos_id] if add_bos and tokenizer.bos_id >= 0 else [])), *tokens]


def sampling_params(
    settings: Mapping[str, Any], end_name: str, default_length: int = MAX_GEN_TOKS
) -> tuple[SamplingParams, list[str]]:
    """A task's generation_kwargs -> (what the engine gets, the texts at which the answer is cut).

    end_name: of the token that ends a text, at which answers are cut, too. Raises ValueError for settings that would
    change the answers in ways that the engine does not know.
    """
    left = dict(settings)
    until = left.pop("until", None)
    stops = [until] if isinstance(until, str) else list(until or ())
    stops = [stop for stop in dict.fromkeys([*stops, end_name]) if stop]
    lengths = [left.pop(name, None) for name in LENGTHS]
    length = next((int(value) for value in lengths if value is not None), default_length)
    draws, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if draws is None:
        draws = temperature is not None and float(temperature) > 0
    left = {name: value for name, value in left.items() if value not in NEUTRAL.get(name, ())}
    if unknown := [name for name in left if name not in PASSED_ON]:
        raise ValueError(
            f"generation_kwargs has {', '.join(f'{name}={left[name]!r}' for name in unknown)}, which this model does "
            f"not know: expected until, do_sample, temperature, {LENGTHS[0]}, {', '.join(PASSED_ON)}"
        )
    if draws:
        left = {"top_p": 1.0, **left}
        left["temperature"] = 1.0 if temperature is None else float(temperature)
    else:
        left = {name: value for name, value in left.items() if name not in ("top_p", "top_k", "min_p")}
        left["temperature"] = 0.0
    return SamplingParams(max_gen_len=length, stop=stops, **left), stops


def answer_text(
    tokenizer: BaseTokenizer, tokens: Sequence[int], text: str, stops: Sequence[str], think_end: str | None
) -> str:
    """An answer as the harness wants it: without special tokens, without what comes before the end of its thoughts."""
    special = set(tokenizer.special_tokens.values())
    if any(token in special for token in tokens):
        text = tokenizer.decode([token for token in tokens if token not in special])
    if think_end:
        text = text.rpartition(think_end)[2].lstrip()
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def render_chat(formatter: Formatter, messages: Sequence[Message], *, adds_prompt: bool) -> str:
    """A conversation as the text of a prompt.

    adds_prompt: whether the beginning of the assistant's next message follows; otherwise the last message is left open,
    so that the model goes on with it. Raises ValueError if there is no chat format, or it refuses the conversation.
    """
    if isinstance(formatter, NoFormat):
        raise ValueError(formatter.reason)
    messages = list(messages)
    if not adds_prompt:
        last = messages[-1]
        messages[-1] = {"role": last["role"], "content": last["content"] + MARK + " "}
    if isinstance(formatter, TemplateFormat):
        pieces = formatter.template.render(
            messages,
            add_generation_prompt=adds_prompt,
            tools=formatter.tools,
            template_args=formatter.template_args,
        )
        text = "".join(piece.text for piece in pieces)
    else:
        text = formatter.tokenizer.decode(formatter.encode_dialog_prompt(messages))
    if adds_prompt:
        return text
    before, mark, after = text.rpartition(MARK)
    if not mark:
        raise ValueError("the chat template leaves out the last message, which the model should go on with")
    return before if after.startswith(" ") else before.rstrip()  # a template that trims messages trims this one, too
