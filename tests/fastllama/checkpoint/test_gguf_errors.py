"""GGUF files whose metadata does not fit, or that are incomplete, truncated or damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllama.checkpoint import open_checkpoint

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.gguf_files import FIELDS, WEIGHTS, quantised, write, write_gguf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"field 'llama\.block_count': expected an integer from 1 to 10000, it is missing"),
        ({"block_count": 3}, r"9 missing: blk\.2\.attn_norm\.weight.*block_count=3, the files have 2 layers"),
        ({"embedding_length": 128}, r"do not have the shape that the metadata requires; token_embd\.weight: expected"),
        ({"embedding_length": "x"}, r"field 'llama\.embedding_length': expected an integer .*, got 'x'"),
        ({"attention__head_count_kv": [2, 2]}, r"head_count_kv': expected an integer .*, got \[2, 2\]"),
        ({"attention__head_count_kv": 3}, r"n_heads to be a multiple of n_kv_heads"),
        ({"attention__key_length": None, "embedding_length": 250}, r"a multiple of the number of heads, 8, got 250"),
        ({"vocab_size": 500}, r"token_embd\.weight: expected \(500, 256\)"),
    ],
)
def test_metadata_that_is_not_this_llamas_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write(tmp_path, **changes))


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    tensors = quantised(WEIGHTS, "F32")
    norm = tensors.pop("output_norm.weight")
    tensors["blk.0.attn_k.bias"] = norm
    path = write_gguf(tmp_path / "model.gguf", FIELDS, tensors)
    message = r"1 missing: output_norm\.weight; 1 unexpected: blk\.0\.attn_k\.bias; all layers have the same biases"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_any_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    data = path.read_bytes()
    header = data.index(WEIGHTS["tok_embeddings.weight"].numpy().tobytes()[:64])
    for length in [*range(0, header, 7), header, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model\.gguf: .*(is empty|begins with|truncated|download it again)"):
            open_checkpoint(path)


def test_a_damaged_header_is_refused_or_read(tmp_path: Path) -> None:
    """Any byte of the header may be wrong: the result is a checkpoint or a ValueError that names the file."""
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(1)
    header = bytes(data).index(WEIGHTS["tok_embeddings.weight"].numpy().tobytes()[:64])
    refused = 0
    for place in generator.integers(4, header, 300):
        old = data[place]
        data[place] = int(generator.integers(0, 256))
        path.write_bytes(data)
        try:
            dict(open_checkpoint(path).dense_tensors(progress=False))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        data[place] = old
    assert refused > 100
