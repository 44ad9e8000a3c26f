"""A trained model generates the text of llama2.c, token for token."""

import pytest

from fastllama import Llama, Transformer
from tests.support.stories260k import BOS_ID, FOLDER, GREEDY_STEPS, GREEDY_TEXT, PiecesTokenizer, read_model

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="stories260K is not beside this checkout")


def build(max_batch_size: int = 1) -> Llama:
    args, weights = read_model(max_seq_len=512, max_batch_size=max_batch_size)
    model = Transformer(args)
    model.load_tensors(weights.items())
    return Llama(model, PiecesTokenizer())


def test_greedy_text_matches_llama2c() -> None:
    llm = build()
    (tokens,), _ = llm.generate([[BOS_ID]], GREEDY_STEPS, temperature=0)
    assert len(tokens) == GREEDY_STEPS
    assert llm.tokenizer.decode(tokens).removeprefix(" ").startswith(GREEDY_TEXT)


def test_stream_and_continued_prompts_give_the_same_tokens() -> None:
    llm = build(max_batch_size=3)
    (tokens,), _ = llm.generate([[BOS_ID]], GREEDY_STEPS, temperature=0)
    text = "".join(increment.text for increment in llm.stream([[BOS_ID]], GREEDY_STEPS, temperature=0))
    assert text == llm.tokenizer.decode(tokens)
    prompts = [[BOS_ID, *tokens[:place]] for place in (3, 57, 120)]
    rows, _ = llm.generate(prompts, 60, temperature=0)
    assert rows == [tokens[place : place + 60] for place in (3, 57, 120)]
