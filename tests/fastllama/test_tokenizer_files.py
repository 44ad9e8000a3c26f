"""Ranks files and folders with tokenizers: files that are read, and files that are refused."""

import base64
from pathlib import Path

import pytest

from fastllama.tokenizer import Tokenizer
from tests.support.tokenizer_files import SMALL_RANKS, small, small_file, small_json, write_json

__all__ = ["small", "small_file", "small_json"]  # fixtures


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


def test_a_folder_named_as_a_tokenizer_is_skipped(tmp_path: Path, small_file: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(small_file.read_bytes())
    assert Tokenizer(tmp_path).n_words == SMALL_RANKS + 256
