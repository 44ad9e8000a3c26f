"""Chat templates that fastllama does not run, and models without one."""

import json
from functools import partial
from typing import Any

from safetensors.torch import save_file

from fastllama.tokenizer_sentencepiece import SentencePieceTokenizer
from tests.support.bad_checkpoints import CONFIG, huggingface
from tests.support.checkpoints import huggingface_weights, random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.pipelines import byte_level, write_pipeline, write_sentencepiece
from tests.support.refusals.case import MODEL, Refusal, build, chat

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROLES = "{% if messages[0].role != 'system' %}{{ raise_exception('the first role must be system') }}{% endif %}"


def _write(template: Any) -> None:
    write_tokenizer(huggingface(MODEL))
    if template is not None:
        (MODEL / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def _other_tokens() -> None:
    tokenizer = byte_level()
    write_pipeline(tokenizer, MODEL)
    params = tiny_params(vocab_size=tokenizer.get_vocab_size())
    (MODEL / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": params["vocab_size"]}))
    save_file(huggingface_weights(params, random_weights(params)), MODEL / "model.safetensors")


def _llama2() -> None:
    tokenizer = SentencePieceTokenizer(write_sentencepiece(MODEL))
    params = tiny_params(vocab_size=tokenizer.n_words)
    write_meta(MODEL, params, random_weights(params))


def _chats(what: str, template: Any) -> Refusal:
    return Refusal(what, partial(_write, template), chat)


def _builds(what: str, template: Any, **options: Any) -> Refusal:
    return Refusal(what, partial(_write, template), partial(build, **options))


CASES = [
    _chats("a base model, without a template", None),
    Refusal("a base model with other special tokens", _other_tokens, chat),
    _chats("templates by name only, none for usual chats", [{"name": "rag", "template": "{{ messages }}"}]),
    Refusal("Llama 2 in Meta's layout", _llama2, chat),
    _chats("a template of more than 100000 characters", "x" * 100_001),
    _chats("a template that raises an error", ROLES),
    _chats("a template that does not end", LOOP),
    _chats("a template that makes a huge text", "{{ 'a' * 10**9 }}"),
    _chats("a template that reaches outside", "{{ messages.__class__.__mro__ }}"),
    _chats("a template that reads files", "{% include '/etc/passwd' %}"),
    _builds("a name that no template has", [{"name": "rag", "template": "{{ messages }}"}], chat_template="tool_use"),
    _builds("variables, and no template", None, template_args={"enable_thinking": False}),
    Refusal(
        '`chat_template="llama3"` with other special tokens', _other_tokens, partial(build, chat_template="llama3")
    ),
]
