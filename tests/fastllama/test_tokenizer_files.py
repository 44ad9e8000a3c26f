"""Reading tokenizer files: what is refused, and `tokenizer.json` against transformers and the tokenizers library."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models.llama3.tokenizer as meta
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_files import _byte_of_character

META_FILE = Path(meta.__file__).parent / "tokenizer.model"
SMALL_RANKS = 2000
CORE_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ranks of Meta's file: any beginning of a BPE is a BPE."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(b"".join(META_FILE.read_bytes().splitlines(keepends=True)[:SMALL_RANKS]))
    return path


@pytest.fixture(scope="module")
def small(small_file: Path) -> Tokenizer:
    return Tokenizer(small_file)


@pytest.fixture(scope="module")
def meta31() -> Tokenizer:
    return Tokenizer(str(META_FILE), llama31=True)


@pytest.fixture(scope="module")
def small_json(small_file: Path) -> str:
    """What transformers makes of the small file and Llama 3.0's special tokens."""
    names = sorted(Tokenizer(small_file).model._special_tokens.items(), key=lambda entry: entry[1])
    with pytest.MonkeyPatch.context() as patch:
        # The converter reads with tiktoken, which would keep a copy of this path's content for later runs.
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        converter = TikTokenConverter(str(small_file), extra_special_tokens=[name for name, _ in names])
        converted: HuggingFaceTokenizer = converter.converted()
    return converted.to_str()


Edit = Callable[[dict[str, Any]], None]


def write_json(path: Path, text: str, edit: Edit | None = None) -> Path:
    document = json.loads(text)
    if edit:
        edit(document)
    path.write_text(json.dumps(document))
    return path


# Text with everything that the pattern tells apart, in runs long enough for merges.
texts = st.text(
    alphabet=st.one_of(
        st.characters(),
        st.sampled_from("etaoin shrdlu 'S'll0123456789\n\r\t .,!?<|>_()\u00a0\u3000éü漢字かな🙂\u0301\u200d"),
    ),
    max_size=60,
)


def test_a_replaced_file_is_read_again(small_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_file.read_bytes())
    assert Tokenizer(path).n_words == SMALL_RANKS + 256
    path.write_bytes(b"".join(small_file.read_bytes().splitlines(keepends=True)[:300]))
    assert Tokenizer(path).n_words == 300 + 256


def test_windows_line_ends_and_blank_lines_are_harmless(small: Tokenizer, small_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert Tokenizer(path).model._mergeable_ranks == small.model._mergeable_ranks


def ranks_file(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


BYTES = [bytes([value]) for value in range(256)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>", "SentencePiece.*Llama 3"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n", "git-lfs"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n<HTML>Not found</HTML>", "web page"),
        (ranks_file(BYTES) + b"YWI=\n", "line 257: expected a token"),
        (ranks_file(BYTES) + b"Y!I= 256\n", "line 257: expected a token"),
        (ranks_file(BYTES) + b"YWI= +256\n", "line 257: expected a token"),
        (ranks_file(BYTES) + b"YWI= " + b"9" * 9999, "line 257: expected a token"),
        (b"PK\x03\x04\x00\x00", "line 1: expected a token"),
        (ranks_file([*BYTES, b"a"]), "line 257: token b'a' has rank 97 already"),
        (ranks_file(BYTES) + b"YWI= 257\n", "none has rank 256"),
        (ranks_file(BYTES) + b"YWI= 255\n", "none has rank 256"),
        (ranks_file([*BYTES[:65], *BYTES[67:]]), "2 of the 256 single bytes .* b'A'"),
    ],
)
def test_bad_ranks_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"nowhere.model does not exist"):
        Tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(
        AssertionError, match=r"expected one of tokenizer.model, tokenizer.json, original/tokenizer.model"
    ):
        Tokenizer(tmp_path)


def test_a_folder_gives_its_own_file_first(
    tmp_path: Path, small_file: Path, small_json: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fastllama")
    lines = small_file.read_bytes().splitlines(keepends=True)
    places = [(303, "original/mp16"), (302, "original/mp8"), (301, "original"), (SMALL_RANKS, "."), (300, ".")]
    for count, place in places:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        if count == SMALL_RANKS:
            write_json(tmp_path / "tokenizer.json", small_json)
        else:
            (tmp_path / place / "tokenizer.model").write_bytes(b"".join(lines[:count]))
        assert Tokenizer(tmp_path).n_words == count + 256
    assert caplog.messages[0] == f"tokenizer: {tmp_path}/original/mp16/tokenizer.model"
    others = "tokenizer.json, original/tokenizer.model, original/mp8/tokenizer.model, original/mp16/tokenizer.model"
    assert caplog.messages[-1] == f"tokenizer: {tmp_path}/tokenizer.model; passed over: {others}"


def test_a_folder_that_is_called_as_a_tokenizer_is_none(tmp_path: Path, small_file: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(small_file.read_bytes())
    assert Tokenizer(tmp_path).n_words == SMALL_RANKS + 256


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
def test_tokenizer_json_encodes_as_its_makers_do(json_pair: tuple[Tokenizer, HuggingFaceTokenizer], text: str) -> None:
    ours, theirs = json_pair
    text = text.encode(errors="replace").decode()
    # Not "all": ours answers to 3.1's names too, which this file does not have.
    tokens = ours.encode(text, bos=False, eos=False, allowed_special=ours.model.special_tokens_set)
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=False)


def test_tokenizer_json_encodes_special_tokens_as_its_makers_do(
    json_pair: tuple[Tokenizer, HuggingFaceTokenizer],
) -> None:
    ours, theirs = json_pair
    text = "<|begin_of_text|>a <|reserved_special_token_2|>\n<|eot_id|><|eot_id|> <|eot_i"
    tokens = ours.encode(text, bos=False, eos=False, allowed_special="all")
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(tokens) == text


def test_whole_tokenizer_json_reads_as_meta_s_file(tmp_path: Path, meta31: Tokenizer) -> None:
    spelling = {byte: character for character, byte in _byte_of_character().items()}
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
    """Give other names to the special tokens in these slots."""

    def edit(document: dict[str, Any]) -> None:
        for entry in document["added_tokens"]:
            entry["content"] = names.get(entry["id"] - SMALL_RANKS, entry["content"])
        if not keep_others:
            keep = names.keys() | CORE_NAMES.keys()
            entries = document["added_tokens"]
            document["added_tokens"] = [entry for entry in entries if entry["id"] - SMALL_RANKS in keep]

    return edit


def test_names_in_tokenizer_json_win(tmp_path: Path, small_json: str) -> None:
    # Hugging Face's 3.1 calls slot 5 what Meta's 3.1 calls slot 12.
    new = {
        4: "<|finetune_right_pad_id|>",
        5: "<|reserved_special_token_2|>",
        8: "<|eom_id|>",
        10: "<|python_tag|>",
        11: "<|im_start|>",
    }
    ours = Tokenizer(write_json(tmp_path / "tokenizer.json", small_json, rename(new, keep_others=False)))
    assert ours.llama31 and SMALL_RANKS + 8 in ours.stop_tokens
    for slot, name in (new | CORE_NAMES).items():
        assert ours.special_tokens[name] == SMALL_RANKS + slot
        assert ours.decode([SMALL_RANKS + slot]) == name
    assert ours.n_words == SMALL_RANKS + 256
    every = [ours.decode([SMALL_RANKS + slot]) for slot in range(256)]
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
        (repeat_added, "is there twice"),
        (put("added_tokens", []), "no special tokens"),
        (put("added_tokens", [{"id": "1", "content": "a"}]), "must have an int as id"),
        (rename({0: "<s>"}), r"expected the special token '<\|begin_of_text\|>' at id 2000, found '<s>'"),
        (rename({20: "<|eom_id|>"}), r"expected the special token '<\|eom_id\|>' at id 2008"),
        (drop("model"), "not a whole tokenizer.json .*'model'"),
        (drop("added_tokens"), "not a whole tokenizer.json"),
        (put("model", [1]), "not a whole tokenizer.json"),
        (put("model.merges", 3), "not a whole tokenizer.json"),
    ],
)
def test_unlike_tokenizer_json_is_refused(tmp_path: Path, small_json: str, edit: Edit, message: str) -> None:
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
