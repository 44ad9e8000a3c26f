"""Writes small GGUF files with the package gguf, without using code of fastllama."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from tokenizers import Tokenizer

from tests.support.checkpoints import Params, Weights, head_dim, hidden_dim, n_kv_heads, random_weights, tiny_params

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Widths of whole blocks of every type.
PARAMS = tiny_params(dim=256, hidden_dim=512)
OUTER_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def stored_name(name: str) -> str:
    """llama.cpp's name of a weight."""
    part, _, kind = name.rpartition(".")
    if part in OUTER_NAMES:
        return f"{OUTER_NAMES[part]}.{kind}"
    _, layer, part = part.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def metadata(params: Params) -> dict[str, Any]:
    """The fields of the architecture."""
    return {
        "llama.block_count": params["n_layers"],
        "llama.embedding_length": params["dim"],
        "llama.feed_forward_length": hidden_dim(params),
        "llama.attention.head_count": params["n_heads"],
        "llama.attention.head_count_kv": n_kv_heads(params),
        "llama.attention.key_length": head_dim(params),
        "llama.attention.value_length": head_dim(params),
        "llama.rope.dimension_count": head_dim(params),
        "llama.attention.layer_norm_rms_epsilon": float(params["norm_eps"]),
        "llama.rope.freq_base": float(params["rope_theta"]),
    }


WEIGHTS = random_weights(PARAMS, seed=3)
FIELDS = metadata(PARAMS)


def quantised(weights: Weights, kind: str) -> dict[str, tuple[np.ndarray, Any]]:
    """(stored data, type) of every weight by llama.cpp's name: matrices in the type, vectors in float32."""
    stored = {}
    for name, weight in weights.items():
        one = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        stored[stored_name(name)] = (gguf.quants.quantize(weight.float().numpy(), one), one)
    return stored


def write_gguf(
    path: Path, fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]], architecture: str = "llama"
) -> Path:
    """A file with these fields and tensors. A field whose value is None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add_field(writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(folder: Path, kind: str = "F32", **changes: Any) -> Path:
    """WEIGHTS in a file; `changes` replace fields, None removes one."""
    fields = FIELDS | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return write_gguf(folder / "model.gguf", fields, quantised(WEIGHTS, kind))


def write_split(
    path: Path, fields: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]], n_files: int
) -> list[Path]:
    """The model in several files: the names and fields that llama.cpp gives them."""
    names, paths = list(tensors), []
    for number in range(n_files):
        own = names[number * len(names) // n_files : (number + 1) * len(names) // n_files]
        split = {"split.no": number, "split.count": n_files, "split.tensors.count": len(names)}
        place = path.with_name(f"{path.stem}-{number + 1:05d}-of-{n_files:05d}.gguf")
        paths.append(write_gguf(place, (fields if number == 0 else {}) | split, {name: tensors[name] for name in own}))
    return paths


def byte_level_fields(tokenizer: Tokenizer, pre: str | None, **changes: Any) -> dict[str, Any]:
    """The fields of a byte-level BPE, from a tokenizer of the package tokenizers."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {
        number: CONTROL if token.special else USER for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(number, NORMAL) for number in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<s>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("</s>"),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece_fields(model: "SentencePieceProcessor", **changes: Any) -> dict[str, Any]:
    """The fields of a SentencePiece model, as llama.cpp's conversion writes them."""
    ids = range(model.vocab_size())
    kinds = [
        BYTE if model.is_byte(i) else CONTROL if model.is_control(i) else UNKNOWN if model.is_unknown(i) else NORMAL
        for i in ids
    ]
    fields = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [float(model.get_score(i)) for i in ids],
        "token_type": kinds,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _add_field(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
