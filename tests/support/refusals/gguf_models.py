"""GGUF files of other models, and of tokenizers that fastllama does not have."""

import struct
from functools import partial
from typing import Any

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor

from tests.support.checkpoints import random_weights, tiny_params
from tests.support.gguf_files import (
    FIELDS,
    PARAMS,
    WEIGHTS,
    byte_level_fields,
    metadata,
    quantised,
    sentencepiece_fields,
    write,
    write_gguf,
)
from tests.support.pipelines import byte_level, write_sentencepiece
from tests.support.refusals.case import MODEL, Refusal, build, without_package

PATH = MODEL / "model.gguf"


def _architecture(name: str) -> None:
    write_gguf(PATH, {}, quantised(WEIGHTS, "F32"), architecture=name)


def _several() -> None:
    for name in ("a.gguf", "b.gguf"):
        write(MODEL).rename(MODEL / name)


def _integers() -> None:
    tensors = quantised(WEIGHTS, "F32")
    tensors["output_norm.weight"] = (np.ones(PARAMS["dim"], np.int8), gguf.GGMLQuantizationType.I8)
    write_gguf(PATH, FIELDS, tensors)


def _rope(**fields: Any) -> None:
    """YaRN with these fields, or another type."""
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
    write(MODEL, **{f"rope__scaling__{key}": value for key, value in {**yarn, **fields}.items()})


def _partial_biases() -> None:
    """Those of Qwen's attention: all but the output's."""
    weights = random_weights(tiny_params(**{**PARAMS, "n_layers": 1, "attention_bias": True}))
    del weights["layers.0.attention.wo.bias"]
    write_gguf(PATH, FIELDS | {"llama.block_count": 1}, quantised(weights, "F32"))


def _version(layout: str, number: int) -> None:
    PATH.write_bytes(b"GGUF" + struct.pack(layout, number, 0, 0))


def _byte_level(pre: str | None = "smollm", **changes: Any) -> None:
    write_gguf(PATH, metadata(PARAMS) | byte_level_fields(byte_level(), pre, **changes), quantised(WEIGHTS, "F32"))


def _normalising() -> None:
    path = write_sentencepiece(MODEL)
    fields = sentencepiece_fields(SentencePieceProcessor(str(path)), remove_extra_whitespaces=True)
    path.unlink()
    write_gguf(PATH, metadata(PARAMS) | fields, quantised(WEIGHTS, "F32"))


CASES = [
    Refusal("without the package `gguf`", partial(write, MODEL), without_package("gguf", build)),
    Refusal("several models in one folder", _several),
    Refusal("the folder of Ollama's files", lambda: write(MODEL).rename(MODEL / "sha256-0a1b2c"), error=AssertionError),
    Refusal("another architecture", partial(_architecture, "qwen2")),
    Refusal("experts", partial(write, MODEL, expert_count=8)),
    Refusal("heads that are rotated partly", partial(write, MODEL, rope__dimension_count=16)),
    Refusal("values of another size than keys", partial(write, MODEL, attention__value_length=16)),
    Refusal("rope of another type", partial(_rope, type="longrope")),
    Refusal("YaRN with another share of unscaled frequencies", partial(_rope, yarn_ext_factor=0.5)),
    Refusal("YaRN's attention factor of another architecture", partial(_rope, yarn_log_multiplier=0.5)),
    Refusal("YaRN with another attention factor", partial(_rope, yarn_attn_factor=2.0)),
    Refusal("an attention factor without YaRN", partial(_rope, type="linear", attn_factor=1.5)),
    Refusal("biases of some projections only", _partial_biases),
    Refusal("sizes that differ between layers", partial(write, MODEL, attention__head_count_kv=[2, 1])),
    Refusal("a type that the package `gguf` does not dequantise", _integers),
    Refusal("the file's version 1", partial(_version, "<IQQ", 1)),
    Refusal("a big-endian file", partial(_version, ">IQQ", 3)),
    Refusal("an unknown pre-tokenizer", partial(_byte_level, "qwen2")),
    Refusal("another kind of tokenizer", partial(_byte_level, model="bert")),
    Refusal("a tokenizer that normalises texts", _normalising),
    Refusal("no tokenizer", partial(_byte_level, model="none"), error=AssertionError),
]
