"""The tokenizer against Meta's package and its tokenizer.model."""

from pathlib import Path
from typing import Any

import llama_models.llama3.tokenizer as meta
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.tokenizer import Tokenizer, split_long_text
from fastllama.tokenizer_base import TextStream
from tests.support.tokenizer_files import META_FILE, SMALL_RANKS, small, small_file, texts

__all__ = ["small", "small_file"]  # fixtures

TEXTS = [
    "",
    " ",
    "This is a test sentence.",
    "naïve café, Ελληνικά, русский, العربية, हिन्दी",
    "日本語のテキストと中文字符、한국어。",
    "🙂🤷🏽‍♀️👨‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\ufeff\u0000",
    "def f(x):\n\treturn [y ** 2 for y in x if y]  # 12345678\r\n\r\n\n   end",
    "I'LL we're DON'T 1234567890 3.14159 $%^&*() ...\n\n\n",
    "  \t leading and trailing \u00a0\u3000 \n ",
    "<|begin_of_text|>hello<|eot_id|><|reserved_special_token_2|>",
    "lone surrogates \ud800 and \udc00\ud83d",
]


@pytest.fixture(scope="module")
def oracle() -> meta.Tokenizer:
    return meta.Tokenizer.get_instance()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(META_FILE))


@pytest.fixture(scope="module")
def tokenizer31() -> Tokenizer:
    return Tokenizer(str(META_FILE), llama31=True)


@given(texts)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_encode_matches_meta(oracle: meta.Tokenizer, tokenizer: Tokenizer, text: str) -> None:
    ours = tokenizer.encode(text, bos=False, eos=False)
    assert ours == oracle.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ours) == oracle.decode(ours)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [set(), "all", {"<|eot_id|>"}], ids=["plain", "all", "eot"])
def test_encode_matches_meta_on_chosen_texts(
    oracle: meta.Tokenizer, tokenizer31: Tokenizer, text: str, special: Any
) -> None:
    ours = tokenizer31.encode(text, bos=True, eos=True, allowed_special=special)
    assert ours == oracle.encode(text, bos=True, eos=True, allowed_special=special)
    assert tokenizer31.decode(ours) == oracle.decode(ours)


@pytest.mark.parametrize(
    ("text", "read"),
    [("\udc80", "\ufffd"), ("a\udcff \ud800b", "a\ufffd \ufffdb"), ("\ud83d\ude00", "\U0001f600")],
    ids=["lone", "within", "pair"],
)
def test_encode_reads_surrogates_as_meta_does(
    oracle: meta.Tokenizer, tokenizer: Tokenizer, text: str, read: str
) -> None:
    ours = tokenizer.encode(text, bos=False, eos=False)
    assert ours == oracle.encode(text, bos=False, eos=False) == tokenizer.encode(read, bos=False, eos=False)


@pytest.mark.parametrize(
    "text",
    [
        " " * 25_001 + "x",
        "x" * 60_000 + " y",
        "ab \n" * 7 + "é" * 25_000 + "\n" + "=" * 25_001,
        "\t" * 25_000 + "word",
        "one two, three " * 26_667 + "x" * 26_000 + " tail",
        "a" * 399_995 + " <|eot_id|> after the cut",
    ],
    ids=["spaces", "letters", "mixed", "no-cut", "beyond-400k", "special-across-cut"],
)
def test_encode_cuts_long_text_as_meta_does(oracle: meta.Tokenizer, tokenizer31: Tokenizer, text: str) -> None:
    ours = tokenizer31.encode(text, bos=False, eos=False, allowed_special="all")
    assert ours == oracle.encode(text, bos=False, eos=False, allowed_special="all")


def test_cuts_fall_where_a_run_reaches_25000_characters() -> None:
    text = "ab" + " " * 50_001 + "c" * 25_000
    assert [len(piece) for piece in split_long_text(text)] == [25_002, 25_000, 25_001]
    # Not 25,000 characters into the run of 60,000: the chunk ends first, and the count starts again.
    text = " x" * 195_000 + "y" * 60_000
    assert [len(piece) for piece in split_long_text(text)] == [400_000, 25_000, 25_000]
    assert list(split_long_text("")) == []


def cuts_of_meta(text: str, chunk: int, run: int) -> list[str]:
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    return [piece for part in chunks for piece in meta.Tokenizer._split_whitespaces_or_nonwhitespaces(part, run)]


@given(st.text(alphabet="ab \t\n\u00a0\x1c\u200b", max_size=60), st.integers(1, 30), st.integers(1, 6))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_cuts_match_meta_at_any_limits(text: str, chunk: int, run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastllama.tokenizer.MAX_CHUNK_CHARS", chunk)
        patch.setattr("fastllama.tokenizer.MAX_RUN_CHARS", run)
        assert list(split_long_text(text)) == cuts_of_meta(text, chunk, run)


def test_cuts_agree_with_meta_on_which_characters_are_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.tokenizer.MAX_RUN_CHARS", 1)
    # Between letters, a character that is not white space belongs to their run; white space separates two runs.
    text = "x".join(map(chr, range(0x110000)))
    assert list(split_long_text(text)) == cuts_of_meta(text, 400_000, 1)


def test_a_sentence_has_its_known_ids(tokenizer: Tokenizer) -> None:
    expected = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tokenizer.encode("This is a test sentence.", bos=True, eos=True) == expected
    assert tokenizer.decode(expected) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"


def test_attributes_are_those_of_llama_3(tokenizer: Tokenizer) -> None:
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128256, 128000, 128001, -1)
    assert tokenizer.stop_tokens == {128001, 128009}
    assert tokenizer.num_reserved_special_tokens == 256
    assert tokenizer.pat_str == meta.Tokenizer.pat_str
    assert tokenizer.model.n_vocab == 128256
    assert repr(tokenizer) == "Tokenizer('tokenizer.model', n_words=128256, llama31=False)"


def test_special_tokens_have_the_names_of_3_0(tokenizer: Tokenizer) -> None:
    own = [tokenizer.decode([token]) for token in range(128000, 128256)]
    reserved = [f"<|reserved_special_token_{count}|>" for count in range(251)]
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    assert own == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *reserved[:4],
        *headers,
        reserved[4],
        "<|eot_id|>",
        *reserved[5:],
    ]
    assert [tokenizer.special_tokens[name] for name in own] == list(range(128000, 128256))


def test_special_tokens_have_the_names_of_3_1(oracle: meta.Tokenizer, tokenizer31: Tokenizer) -> None:
    for name, token in oracle.special_tokens.items():
        assert tokenizer31.special_tokens[name] == token
        assert tokenizer31.decode([token]) == tokenizer31.model.decode([token]) == name


def test_special_tokens_have_the_other_versions_names_too(tokenizer: Tokenizer, tokenizer31: Tokenizer) -> None:
    assert tokenizer.special_tokens["<|eom_id|>"] == tokenizer.special_tokens["<|reserved_special_token_4|>"] == 128008
    assert tokenizer.special_tokens["<|python_tag|>"] == 128010
    assert tokenizer31.special_tokens["<|reserved_special_token_250|>"] == 128255
    # One name for two ids: the tokenizer's own version decides.
    assert tokenizer.special_tokens["<|reserved_special_token_2|>"] == 128004
    assert tokenizer31.special_tokens["<|reserved_special_token_2|>"] == 128012


@pytest.mark.parametrize("version", ["tokenizer", "tokenizer31"])
def test_encode_recognises_both_names_of_a_special_token(version: str, request: pytest.FixtureRequest) -> None:
    ours: Tokenizer = request.getfixturevalue(version)
    text = "a<|eom_id|>b<|reserved_special_token_249|> c"
    expected = [64, 128008, 65, 128254, 272]
    assert ours.encode(text, bos=False, eos=False, allowed_special="all") == expected
    only = ours.encode(text, bos=False, eos=False, allowed_special={"<|eom_id|>"})
    assert only[:3] == expected[:3] and 128254 not in only


def test_use_llama31_names_changes_names_and_stop_tokens(small_file: Path) -> None:
    ours = Tokenizer(small_file)
    stop_tokens = ours.stop_tokens
    stop_tokens.add(5)
    eom = SMALL_RANKS + 8
    assert ours.decode([eom]) == "<|reserved_special_token_4|>"
    ours.use_llama31_names()
    ours.use_llama31_names()
    assert ours.decode([eom]) == "<|eom_id|>"
    assert ours.special_tokens == Tokenizer(small_file, llama31=True).special_tokens
    assert ours.stop_tokens is stop_tokens
    assert stop_tokens == {5, SMALL_RANKS + 1, SMALL_RANKS + 8, SMALL_RANKS + 9}


def test_special_text_is_plain_by_default(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|eot_id|>", bos=False, eos=False)
    assert max(tokens) < 128000
    assert tokenizer.decode(tokens) == "<|eot_id|>"


@pytest.mark.parametrize("disallowed", ["all", {"<|eot_id|>"}, ["<|eot_id|>"]])
def test_disallowed_special_text_is_refused(tokenizer: Tokenizer, disallowed: Any) -> None:
    with pytest.raises(ValueError, match=r"<\|eot_id\|>.*disallowed_special"):
        tokenizer.encode("a <|eot_id|>", bos=False, eos=False, disallowed_special=disallowed)
    assert tokenizer.encode("plain", bos=False, eos=False, disallowed_special=disallowed)


def test_disallowing_all_keeps_what_is_allowed(tokenizer: Tokenizer) -> None:
    allowed = {"<|eot_id|>"}
    tokens = tokenizer.encode("<|eot_id|>", bos=False, eos=False, allowed_special=allowed, disallowed_special="all")
    assert tokens == [128009]


def test_a_single_name_is_refused_as_a_set_of_names(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="allowed_special must be"):
        tokenizer.encode("a", bos=False, eos=False, allowed_special="<|eot_id|>")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [None, b"bytes", ["a", "b"], 3])
def test_encode_rejects_values_that_are_not_text(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(AssertionError, match=type(text).__name__):
        tokenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("token", [-1, 128256, 2**40, -(2**70)])
def test_decode_rejects_ids_outside_the_vocabulary(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token} at position 1 .* 0 to 128255"):
        tokenizer.decode([5, token])


@pytest.mark.parametrize("tokens", ["text", [1.5], 7, [None], [[1, 2]]])
def test_decode_rejects_values_that_are_not_ids(tokenizer: Tokenizer, tokens: Any) -> None:
    with pytest.raises(ValueError, match="sequence of token ids"):
        tokenizer.decode(tokens)


def test_decode_takes_any_sequence_of_ints(tokenizer: Tokenizer) -> None:
    import numpy
    import torch

    ids = [2028, 374, 264, 1296]
    sequences: list[Any] = [tuple(ids), range(5, 9), numpy.array(ids), torch.tensor(ids), []]
    for sequence in sequences:
        assert tokenizer.decode(sequence) == tokenizer.decode([int(token) for token in sequence])


@given(st.lists(st.lists(st.one_of(st.integers(0, 300), st.integers(0, SMALL_RANKS + 255)), max_size=6), max_size=8))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_stream_pieces_join_to_the_complete_text(small: Tokenizer, pushes: list[list[int]]) -> None:
    stream = TextStream(small)
    pieces = [stream.push(tokens) for tokens in pushes]
    assert "".join(pieces) + stream.finish() == small.decode([token for tokens in pushes for token in tokens])
    assert stream.finish() == ""


@given(texts)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_stream_never_splits_a_character(small: Tokenizer, text: str) -> None:
    stream = TextStream(small)
    text = text.encode(errors="replace").decode()
    sent = ""
    for token in small.encode(text, bos=False, eos=False):
        sent += stream.push([token])
        assert text.startswith(sent)
    assert sent == text and stream.finish() == ""


def test_stream_keeps_bytes_until_they_make_a_character(small: Tokenizer) -> None:
    stream = TextStream(small)
    byte = {value: small.model.encode_single_token(bytes([value])) for value in range(256)}
    assert [stream.push([byte[value]]) for value in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push([byte[0xF0], byte[0x9F]]) == ""
    with pytest.raises(ValueError, match="outside the vocabulary"):
        stream.push([byte[0x99], 10**6])
    assert stream.push([byte[0x99]]) == ""
    assert stream.push([small.eos_id]) == "\ufffd<|end_of_text|>"
    assert stream.push([byte[0xE2]]) == "" and stream.finish() == "\ufffd"
