"""What is known of a model without its tensors is the same in another process, for every kind of tokenizer."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama
from fastllama.engine.facts import Facts
from tests.support.checkpoint_kinds import Build, gguf, huggingface, llama2, meta

KINDS: dict[str, Callable[[Path], Build]] = {  # of tokenizers and formats
    "tiktoken": meta,
    "SentencePiece": llama2,
    "tokenizers": huggingface,
    "no template": partial(huggingface, tokenizer="unigram", has_template=False),
    "GGUF": partial(gguf, kind="Q8_0"),
    "GGUF, SentencePiece": partial(gguf, kind="Q8_0", tokenizer="sentencepiece"),
}
DIALOG: Any = [{"role": "user", "content": "Où est-il ?"}]


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_the_same_in_another_process(kind: str, tmp_path: Path) -> None:
    llm = Llama.build(**KINDS[kind](tmp_path / "model"), max_seq_len=64, max_batch_size=2, device="cpu")
    facts = Facts.of(llm)
    found = pickle.loads(pickle.dumps(facts))
    sizes = lambda one: (one.vocab_size, one.max_seq_len, one.max_batch_size, one.cache_pages)  # noqa: E731
    assert sizes(found) == sizes(facts) == (llm.model.vocab_size, 64, 2, llm.model.cache.pool.n_pages)
    text = "Straße, naïve café <|eot_id|></s> 東京"
    tokens = facts.tokenizer.encode(text, bos=True, eos=True, allowed_special="all")
    assert found.tokenizer.encode(text, bos=True, eos=True, allowed_special="all") == tokens
    assert found.tokenizer.decode(tokens) == facts.tokenizer.decode(tokens)
    assert found.tokenizer.stop_tokens == facts.tokenizer.stop_tokens
    assert type(found.formatter) is type(facts.formatter)
    assert _written(found, DIALOG) == _written(facts, DIALOG)


def _written(facts: Facts, dialog: Any) -> list[int] | str:
    try:
        return facts.formatter.encode_dialog_prompt(dialog)
    except ValueError as error:
        return str(error)
