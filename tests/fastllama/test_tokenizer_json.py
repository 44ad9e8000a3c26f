"""`tokenizer.json` against transformers and the tokenizers library, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as HuggingFaceTokenizer

from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_files import byte_decoder
from tests.support.tokenizer_files import META_FILE, SMALL_RANKS, Edit, small, small_file, small_json, texts, write_json

__all__ = ["small", "small_file", "small_json"]  # fixtures

# Llama 3.0's named special tokens, by offset: the id minus the number of ranks.
CORE_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}


@pytest.fixture(scope="module")
def meta31() -> Tokenizer:
    return Tokenizer(str(META_FILE), llama31=True)


def test_a_token_with_two_ids_is_refused(tmp_path: Path, small_json: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        small_json.replace('"vocab": {', '"vocab": {"!": 7, ')
        if '"vocab": {' in small_json
        else small_json.replace('"vocab":{', '"vocab":{"!":7,')
    )
    with pytest.raises(ValueError, match=r"tokenizer.json: '!' appears twice, as 7 and as 0; the file is damaged$"):
        Tokenizer(path)


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_tokenizer_json_matches_tokenizer_model(tmp_path: Path, small: Tokenizer, small_json: str, merges: str) -> None:
    def old_form(document: dict[str, Any]) -> None:
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]

    ours = Tokenizer(write_json(tmp_path / "tokenizer.json", small_json, old_form if merges == "strings" else None))
    assert ours.n_words == small.n_words
    assert ours.special_tokens == small.special_tokens
    assert ours.stop_tokens == small.stop_tokens
    assert not ours.llama31
    assert ours.model._mergeable_ranks == small.model._mergeable_ranks


@pytest.fixture(scope="module")
def json_pair(tmp_path_factory: pytest.TempPathFactory, small_json: str) -> tuple[Tokenizer, HuggingFaceTokenizer]:
    path = write_json(tmp_path_factory.mktemp("json") / "tokenizer.json", small_json)
    return Tokenizer(path), HuggingFaceTokenizer.from_file(str(path))


@given(texts)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_tokenizer_json_encodes_like_tokenizers(json_pair: tuple[Tokenizer, HuggingFaceTokenizer], text: str) -> None:
    ours, theirs = json_pair
    text = text.encode(errors="replace").decode()
    # Not "all": Tokenizer also accepts 3.1's names, which this file does not have.
    tokens = ours.encode(text, bos=False, eos=False, allowed_special=ours.model.special_tokens_set)
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False)


def test_tokenizer_json_encodes_special_tokens_like_tokenizers(
    json_pair: tuple[Tokenizer, HuggingFaceTokenizer],
) -> None:
    ours, theirs = json_pair
    text = "<|begin_of_text|>a <|reserved_special_token_2|>\n<|eot_id|><|eot_id|> <|eot_i"
    tokens = ours.encode(text, bos=False, eos=False, allowed_special="all")
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(tokens) == text


def test_complete_tokenizer_json_reads_as_metas_file(tmp_path: Path, meta31: Tokenizer) -> None:
    spelling = {byte: character for character, byte in byte_decoder().items()}
    ranks = meta31.model._mergeable_ranks
    vocab, merges = {}, []
    for token, rank in ranks.items():
        text = "".join(map(spelling.__getitem__, token))
        vocab[text] = rank
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        merges += [[text[:cut], text[cut:]] for cut in cuts[:1]]
    document = {
        "added_tokens": [{"id": id, "content": name} for name, id in meta31.model._special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": meta31.pat_str},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    ours = Tokenizer(tmp_path)
    assert ours.llama31 and ours.stop_tokens == meta31.stop_tokens
    assert ours.model._mergeable_ranks == ranks
    assert ours.special_tokens == meta31.special_tokens


def rename(names: dict[int, str], keep_others: bool = True) -> Edit:
    """Rename special tokens, by offset. Without `keep_others`, only these and CORE_NAMES stay."""

    def edit(document: dict[str, Any]) -> None:
        for entry in document["added_tokens"]:
            entry["content"] = names.get(entry["id"] - SMALL_RANKS, entry["content"])
        if not keep_others:
            keep = names.keys() | CORE_NAMES.keys()
            entries = document["added_tokens"]
            document["added_tokens"] = [entry for entry in entries if entry["id"] - SMALL_RANKS in keep]

    return edit


def test_names_in_tokenizer_json_replace_the_versions(tmp_path: Path, small_json: str) -> None:
    # In Hugging Face's 3.1 this name of offset 5 is what Meta's 3.1 calls offset 12.
    new = {
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        8: "<|eom_id|>",
        10: "<|python_tag|>",
        11: "<|im_start|>",
    }
    ours = Tokenizer(write_json(tmp_path / "tokenizer.json", small_json, rename(new, keep_others=False)))
    assert ours.llama31 and SMALL_RANKS + 8 in ours.stop_tokens
    for offset, name in (new | CORE_NAMES).items():
        assert ours.special_tokens[name] == SMALL_RANKS + offset
        assert ours.decode([SMALL_RANKS + offset]) == name
    assert ours.n_words == SMALL_RANKS + 256
    every = [ours.decode([SMALL_RANKS + offset]) for offset in range(256)]
    assert len(set(every)) == 256
    assert ours.special_tokens["<|step_id|>"] == SMALL_RANKS + 5
    assert every[12] == "<|unnamed_special_token_12|>"


def test_special_tokens_may_be_in_the_vocabulary_too(tmp_path: Path, small: Tokenizer, small_json: str) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in document["added_tokens"]}

    ours = Tokenizer(write_json(tmp_path / "tokenizer.json", small_json, edit))
    assert ours.n_words == small.n_words and ours.special_tokens == small.special_tokens


def put(path: str, value: Any) -> Edit:
    """Set the value at a path such as model.type or pre_tokenizer.pretokenizers.0.behavior."""

    def edit(document: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            document = document[int(key)] if isinstance(document, list) else document[key]
        document[last] = value

    return edit


def drop(path: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        del document[path]

    return edit


def swap_merges(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def lose_a_merge(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    document["model"]["merges"] = [merge for merge in merges if "".join(merge) != "".join(merges[40])]


def shift_an_id(document: dict[str, Any]) -> None:
    vocab = document["model"]["vocab"]
    vocab[next(token for token, rank in vocab.items() if rank == 7)] = 6


def extend(document: dict[str, Any]) -> None:
    document["added_tokens"].append({"id": SMALL_RANKS + 256, "content": "[PAD]"})


def repeat_added(document: dict[str, Any]) -> None:
    document["added_tokens"].append(document["added_tokens"][3])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("model.type", "Unigram"), "its model is 'Unigram', expected 'BPE'"),
        (put("model.byte_fallback", True), "byte_fallback"),
        (put("model.unk_token", "<unk>"), "unk_token='<unk>'"),
        (put("model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (put("model.vocab", {"▁the": 0}), "'▁the', id 0, is not written as bytes"),
        (put("model.vocab", {"a b": 0}), "is not written as bytes"),
        (put("model.vocab", {"a": 0.5}), "expected an int"),
        (put("normalizer", {"type": "NFC"}), "normalizes text"),
        (put("pre_tokenizer", None), "expected Split and then ByteLevel"),
        (put("pre_tokenizer", {"type": "Metaspace"}), "Metaspace.*expected Split and then ByteLevel"),
        (put("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\s+"}), "expected Llama 3's pattern"),
        (put("pre_tokenizer.pretokenizers.0.behavior", "Removed"), "expected Llama 3's pattern, isolated"),
        (put("pre_tokenizer.pretokenizers.1.use_regex", True), "ByteLevel step"),
        (put("model.merges", []), "come from no merge"),
        (put("model.merges", ["a b c"]), "does not join two tokens"),
        (put("model.merges", [["a"]]), "does not join two tokens"),
        (put("model.merges", [["zq", "xv"]]), "does not join two tokens"),
        (swap_merges, "but an earlier one makes"),
        (lose_a_merge, "1 of its tokens, such as .* come from no merge"),
        (shift_an_id, "none has rank 7"),
        (extend, r"'\[PAD\]' has id 2256, but Llama 3's special tokens are ids 2000 to 2255"),
        (repeat_added, "is listed twice"),
        (put("added_tokens", []), "no special tokens"),
        (put("added_tokens", [{"id": "1", "content": "a"}]), "must have an int as id"),
        (rename({0: "<s>"}), r"expected the special token '<\|begin_of_text\|>' at id 2000, found '<s>'"),
        (rename({20: "<|eom_id|>"}), r"expected the special token '<\|eom_id\|>' at id 2008"),
        (drop("model"), "not a complete tokenizer.json .*'model'"),
        (drop("added_tokens"), "not a complete tokenizer.json"),
        (put("model", [1]), "not a complete tokenizer.json"),
        (put("model.merges", 3), "not a complete tokenizer.json"),
    ],
)
def test_tokenizer_json_of_another_kind_is_refused(tmp_path: Path, small_json: str, edit: Edit, message: str) -> None:
    path = write_json(tmp_path / "tokenizer.json", small_json, edit)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b'{"model":', b'{"a": "\xff"}', b'{"a":' + b"[" * 200_000])
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not valid JSON"):
        Tokenizer(path)
