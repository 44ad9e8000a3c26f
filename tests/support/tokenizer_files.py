"""Tokenizer files for tests: the beginning of Meta's `tokenizer.model`, and transformers' `tokenizer.json` of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models.llama3.tokenizer as meta
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from fastllama.tokenizer import Tokenizer

META_FILE = Path(meta.__file__).parent / "tokenizer.model"
SMALL_RANKS = 2000

# Text with all the characters that the split pattern distinguishes, in runs long enough for merges.
texts = st.text(
    alphabet=st.one_of(
        st.characters(),
        st.sampled_from("etaoin shrdlu 'S'll0123456789\n\r\t .,!?<|>_()\u00a0\u3000éü漢字かな🙂\u0301\u200d"),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first SMALL_RANKS ranks of Meta's file. The first ranks of a BPE are a BPE."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    path.write_bytes(b"".join(META_FILE.read_bytes().splitlines(keepends=True)[:SMALL_RANKS]))
    return path


@pytest.fixture(scope="module")
def small(small_file: Path) -> Tokenizer:
    return Tokenizer(small_file)


@pytest.fixture(scope="module")
def small_json(small_file: Path) -> str:
    """transformers' tokenizer.json for the small file and Llama 3.0's special tokens."""
    names = sorted(Tokenizer(small_file).model._special_tokens.items(), key=lambda entry: entry[1])
    with pytest.MonkeyPatch.context() as patch:
        # The converter reads with tiktoken, which would otherwise cache the content of this path for later runs.
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        converter = TikTokenConverter(str(small_file), extra_special_tokens=[name for name, _ in names])
        converted: HuggingFaceTokenizer = converter.converted()
    return converted.to_str()


Edit = Callable[[dict[str, Any]], None]


def write_json(path: Path, text: str, edit: Edit | None = None) -> Path:
    """The JSON `text`, after `edit`, in a file."""
    document = json.loads(text)
    if edit:
        edit(document)
    path.write_text(json.dumps(document))
    return path
