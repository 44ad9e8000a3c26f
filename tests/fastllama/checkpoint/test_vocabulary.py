"""Tokenizers and embeddings of different sizes: the error says what is wrong and what to do."""

import json
import re
from pathlib import Path

import pytest

from fastllama import Llama
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.command_line import run

MORE = (
    "the checkpoint's embedding has 600 rows and the tokenizer beside it 576 tokens: the vocabulary was padded or "
    "extended by 24 rows, which Meta's layout does not allow; if no token uses them, cut them off"
)
FEWER = (
    "the checkpoint's embedding has 560 rows and the tokenizer beside it 576 tokens: 16 tokens have no row; either "
    "they were added to the tokenizer alone, or one of the two is another model's; download both again, or add the "
    "rows with transformers' resize_token_embeddings(576) and save_pretrained, and train them"
)
OTHER_TOKENIZER = "use the tokenizer that belongs to the checkpoint"
APART = f"the checkpoint has a vocabulary of {{}} and the tokenizer one of 576: {OTHER_TOKENIZER}"


def checkpoint(folder: Path, rows: int) -> Path:
    params = tiny_params(vocab_size=rows, n_layers=1)
    return write_meta(folder, params, random_weights(params))


def refused(folder: Path, tokenizer: Path, message: str) -> None:
    with pytest.raises(AssertionError, match=f"^{re.escape(message)}$"):
        Llama.build(str(folder), str(tokenizer), 16, 1, device="cpu")


@pytest.mark.parametrize(("rows", "message"), [(600, MORE), (560, FEWER)])
@pytest.mark.parametrize("place", [".", "original", "original/mp8"])
def test_a_tokenizer_of_the_same_folder_gives_advice_on_the_vocabulary(
    tmp_path: Path, rows: int, message: str, place: str
) -> None:
    checkpoint(tmp_path / place, rows)
    for folder in {tmp_path, tmp_path / place}:
        file = write_tokenizer(folder)
        refused(tmp_path, file, message)
        refused(tmp_path, folder, message)
        file.unlink()


@pytest.mark.parametrize("rows", [600, 560])
def test_a_tokenizer_of_another_folder_is_named_as_the_cause(tmp_path: Path, rows: int) -> None:
    checkpoint(tmp_path / "a", rows)
    for folder in (tmp_path / "b", tmp_path):
        refused(tmp_path / "a", write_tokenizer(folder), APART.format(rows))


def test_a_folder_that_is_a_link_is_the_same_folder(tmp_path: Path) -> None:
    write_tokenizer(checkpoint(tmp_path / "a", 600))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(tmp_path / "b", tmp_path / "a" / "tokenizer.model", MORE)


def test_a_padded_vocabulary_loads_in_hugging_faces_layout(tmp_path: Path) -> None:
    params = tiny_params(vocab_size=640, n_layers=1)
    folder = write_huggingface(tmp_path / "padded", params, random_weights(params))
    file = write_tokenizer(folder)
    llm = Llama.build(str(folder), str(file), 16, 1, device="cpu")
    assert len(llm.generate([[1, 639]], 2, temperature=0)[0][0]) == 2
    assert llm.tokenizer.decode([639, 65, 576]) == llm.tokenizer.decode([65])
    assert "tokenizer: 576 tokens, and 64 rows of the embedding without a token\n" in run("inspect", str(folder)).stdout
    refused(folder, write_tokenizer(tmp_path / "elsewhere"), APART.format(640))


@pytest.mark.parametrize(("rows", "message"), [(600, MORE), (560, FEWER), (576, None)])
def test_inspect_explains_a_vocabulary_mismatch(tmp_path: Path, rows: int, message: str | None) -> None:
    write_tokenizer(checkpoint(tmp_path, rows))
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)["tokenizer"]
    assert (found["fits_checkpoint"], found["misfit"]) == (message is None, message)
    assert found["path"] == str(tmp_path / "tokenizer.model")
    text = run("inspect", str(tmp_path)).stdout
    assert (f"tokenizer: 576 tokens, NOT the checkpoint's vocabulary of {rows}\n" in text) == (message is not None)
    assert message is None or message in text
