"""The tokenizer in a GGUF file: ids and texts against the package that each kind of tokenizer comes from."""

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, pre_tokenizers

from fastllama.tokenizer_gguf import GgufTokenizer
from fastllama.tokenizer_open import open_tokenizer
from tests.support.pipelines import CORPUS, byte_level, write_sentencepiece

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.gguf_files import NORMAL, byte_level_fields, sentencepiece_fields, write_gguf

TEXTS = [*CORPUS, "", " ", "a", "  two", "1234 + 56\n\n", "it's we'LL", "naïve\u0301 ﬁ", "🚀" * 5, "ends with space "]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_as(name: str | None) -> pre_tokenizers.PreTokenizer:
    """The splits of a name, made with the package."""
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif name == "llama-bpe":
        steps = [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(steps)


def write(folder: Path, pre: str | None = "smollm", **changes: Any) -> Path:
    return write_gguf(folder / "model.gguf", byte_level_fields(byte_level(), pre, **changes), {})


def write_scores(folder: Path, model: SentencePieceProcessor, **changes: Any) -> Path:
    return write_gguf(folder / "model.gguf", sentencepiece_fields(model, **changes), {})


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", None])
def test_byte_level_ids_and_texts_are_those_of_the_pipeline(tmp_path: Path, pre: str | None) -> None:
    library = byte_level()
    library.pre_tokenizer = split_as(pre)
    ours = open_tokenizer(write(tmp_path, pre))
    assert isinstance(ours, GgufTokenizer)
    assert ours.n_words == library.get_vocab_size()
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, eos=False) == ids, text
        assert ours.decode(ids) == text
    text = "<|im_start|>user\nHi<|im_end|>"
    expected = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False, eos=False, allowed_special="all") == expected
    assert ours.encode(text, bos=False, eos=False) != expected


def test_llama3_takes_whole_words_that_are_tokens(tmp_path: Path) -> None:
    fields = byte_level_fields(byte_level(), "llama-bpe")
    fields["tokenizer.ggml.tokens"].append("zqzq")  # no merge makes it
    fields["tokenizer.ggml.token_type"].append(NORMAL)
    number = len(fields["tokenizer.ggml.tokens"]) - 1
    path = write_gguf(tmp_path / "model.gguf", fields, {})
    assert open_tokenizer(path).encode("zqzq", bos=False, eos=False) == [number]
    fields["tokenizer.ggml.pre"] = "gpt-2"
    assert number not in open_tokenizer(write_gguf(path, fields, {})).encode("zqzq", bos=False, eos=False)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_scores_give_the_ids_of_sentencepiece(tmp_path: Path, has_prefix: bool) -> None:
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    file = write_sentencepiece(tmp_path, add_dummy_prefix=has_prefix, **options)
    library = SentencePieceProcessor(str(file))
    ours = open_tokenizer(write_scores(tmp_path, library, add_space_prefix=has_prefix))
    assert ours.n_words == library.vocab_size()
    for text in TEXTS:
        ids = library.encode(text)
        assert ours.encode(text, bos=False, eos=False) == ids, text
        assert ours.decode(ids) == library.decode(ids), text
    assert ours.encode("a", bos=True, eos=True) == [library.bos_id(), *library.encode("a"), library.eos_id()]


@pytest.mark.parametrize(
    ("pre", "stated", "begins"),
    [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True), ("llama-bpe", False, False)],
)
def test_a_text_begins_as_the_file_says(tmp_path: Path, pre: str, stated: bool | None, begins: bool) -> None:
    tokenizer = open_tokenizer(write(tmp_path, pre, add_bos_token=stated))
    assert (tokenizer.encode("a", bos=True, eos=False)[0] == tokenizer.bos_id) == begins


def test_named_tokens_stop_tokens_and_chat_template(tmp_path: Path) -> None:
    library = byte_level()
    ids = {name: library.token_to_id(name) for name in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")}
    fields = byte_level_fields(library, "smollm", eot_token_id=ids["<|im_end|>"], padding_token_id=ids["<s>"])
    template = "{{ messages }}"
    templates = {"tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "tools"}
    path = write_gguf(tmp_path / "model.gguf", fields | templates, {})
    tokenizer = open_tokenizer(path)
    assert isinstance(tokenizer, GgufTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids["<s>"], ids["</s>"], ids["<s>"])
    assert tokenizer.stop_tokens == {ids["</s>"], ids["<|im_end|>"]}
    assert tokenizer.special_tokens == ids
    assert tokenizer.chat_templates == {"default": template, "tool_use": "tools"}
    assert GgufTokenizer(write(tmp_path)).chat_templates == {}


def test_user_defined_tokens_are_matched_in_any_text(tmp_path: Path) -> None:
    library = byte_level()
    tokenizer = open_tokenizer(write(tmp_path))
    ids = tokenizer.encode("a<think>b", bos=False, eos=False)
    assert library.token_to_id("<think>") in ids
    assert ids == library.encode("a<think>b", add_special_tokens=False).ids
    assert "<think>" not in tokenizer.special_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 7}, r"tokenizer\.ggml\.model': expected a text, got 7"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores': expected a list of \d+ numbers.*, it is missing"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens': expected a list of texts, it is missing"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens': expected a list of texts, got \[1, 2\]"),
        ({"merges": None}, r"tokenizer\.ggml\.merges': expected a list of texts, it is missing"),
        ({"merges": ["abc"]}, r"merges': expected two tokens with a space between them, got 'abc'"),
        ({"merges": ["zq zq"]}, r"is not a tokenizer that the package tokenizers reads"),
        ({"token_type": [1, 2]}, r"token_type': expected a list of \d+ numbers, one for every token"),
        ({"bos_token_id": 99999}, r"bos_token_id': expected a token id from 0 to \d+, got 99999"),
        ({"add_bos_token": 1}, r"add_bos_token': expected true or false, got 1"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **{"pre": "smollm", **changes})
    with pytest.raises(ValueError, match=rf"model\.gguf.*({message})"):
        open_tokenizer(path)


@pytest.mark.parametrize("model", [None, "no_vocab"])
def test_a_file_may_have_no_tokenizer(tmp_path: Path, model: str | None) -> None:
    with pytest.raises(AssertionError, match=r"model\.gguf has no tokenizer; give the path"):
        open_tokenizer(write(tmp_path, model=model))


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    fields = byte_level_fields(byte_level(), "smollm")
    fields["tokenizer.ggml.tokens"][-1] = fields["tokenizer.ggml.tokens"][-2]
    path = write_gguf(tmp_path / "model.gguf", fields, {})
    with pytest.raises(ValueError, match=r"tokens \d+ and \d+ have the same text"):
        open_tokenizer(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"abcdef", b"version https://git-lfs"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.gguf: expected a GGUF file, got one that begins with"):
            open_tokenizer(path)


def test_the_folders_own_tokenizer_file_goes_before_ggufs(tmp_path: Path) -> None:
    write(tmp_path)
    assert isinstance(open_tokenizer(tmp_path), GgufTokenizer)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert not isinstance(open_tokenizer(tmp_path), GgufTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path).rename(tmp_path / "b.gguf")
    write(tmp_path)
    with pytest.raises(AssertionError, match="no tokenizer in the folder"):
        open_tokenizer(tmp_path)
