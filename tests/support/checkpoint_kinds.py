"""Writes a tiny model of every kind of checkpoint. Its widths can be divided between two processes.

    builds = write_kinds(root)                      # the arguments of Llama.build by the kind's name
    Llama.build(**builds["Meta, 2 shards"], max_seq_len=..., ...)

To add a kind, add a line to KINDS.
"""

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from tests.support.adapters import random_factors, write_adapter
from tests.support.checkpoints import (
    Params,
    Weights,
    random_weights,
    tiny_params,
    write_huggingface,
    write_meta,
    write_tokenizer,
)
from tests.support.pipelines import PIPELINES, byte_level, write_pipeline, write_sentencepiece

Build = dict[str, Any]  # keyword arguments of Llama.build, as in JSON

TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
SEED = 5  # of the weights: with it no greedy text stops early or repeats one token only
N_PIECES = 400  # of write_sentencepiece
ADAPTER_TARGETS = (("q_proj", "v_proj", "o_proj"), ("k_proj", "down_proj", "lm_head"))
# A row of w2 is five blocks of GGUF, so half of it, a process's part, ends inside a block.
GGUF_WIDTHS: Params = {"dim": 64, "hidden_dim": 160}
BIASES: Params = {"attention_bias": True, "mlp_bias": True}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def meta(folder: Path, shards: int = 1, adapters: int = 0, **changes: Any) -> Build:
    """Meta's layout with tiktoken ranks. `changes`: of the params."""
    params = tiny_params(**changes)
    weights = random_weights(params, seed=SEED)
    write_meta(folder, params, weights, shards)
    tokenizer = write_tokenizer(folder)
    return _build(folder, tokenizer, _write_adapters(folder, adapters, params, weights))


def llama2(folder: Path) -> Build:
    """Llama 2's layout, whose embedding is divided by columns, with a SentencePiece model."""
    params = tiny_params(vocab_size=N_PIECES)
    write_meta(folder, params, random_weights(params, seed=SEED), shards=2, embedding_axis=1)
    return _build(folder, write_sentencepiece(folder))


def huggingface(
    folder: Path,
    tokenizer: str = "byte-level",
    has_template: bool = True,
    adapters: int = 0,
    max_shard_size: str = "5GB",
    rope_parameters: Params | None = None,
    **changes: Any,
) -> Build:
    """A folder with its tokenizer: one of PIPELINES, "sentencepiece", or "ranks" for tiktoken's."""
    folder.mkdir()
    template = {"chat_template": TEMPLATE} if has_template else {}
    if tokenizer in PIPELINES:
        pipeline = PIPELINES[tokenizer]()
        write_pipeline(pipeline, folder, **template)
        n_words = _padded(pipeline.get_vocab_size())
    else:
        n_words = N_PIECES if tokenizer == "sentencepiece" else tiny_params()["vocab_size"]
        (write_sentencepiece if tokenizer == "sentencepiece" else write_tokenizer)(folder)
        bos = "<s>" if tokenizer == "sentencepiece" else "<|begin_of_text|>"
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, **template}))
    params = tiny_params(**{"vocab_size": n_words, **changes})
    weights = random_weights(params, seed=SEED)
    write_huggingface(folder, params, weights, max_shard_size, rope_parameters=rope_parameters)
    return _build(folder, None, _write_adapters(folder, adapters, params, weights))


def gguf(
    folder: Path,
    kind: str,
    n_files: int = 1,
    tokenizer: str = "byte-level",
    has_template: bool = True,
    adapters: int = 0,
    rope: Params | None = None,
    seed: int = SEED,
    **changes: Any,
) -> Build:
    """A GGUF file, or several, whose matrices have the type `kind`, with its tokenizer. rope: fields of its scaling."""
    from tests.support import gguf_files as files

    folder.mkdir()
    if tokenizer == "sentencepiece":
        # The fields of a GGUF file describe no normalisation.
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        file = write_sentencepiece(folder, **options)
        model = SentencePieceProcessor(str(file))
        file.unlink()
        n_words, fields = N_PIECES, files.sentencepiece_fields(model)
    else:
        pipeline = byte_level()
        n_words, fields = _padded(pipeline.get_vocab_size()), files.byte_level_fields(pipeline, "smollm")
    params = tiny_params(vocab_size=n_words, **GGUF_WIDTHS, **changes)
    weights = random_weights(params, seed=seed)
    fields |= files.metadata(params) | ({"tokenizer.chat_template": TEMPLATE} if has_template else {})
    fields |= {f"llama.rope.scaling.{key}": value for key, value in (rope or {}).items()}
    stored = {name: one for name, one in weights.items() if not (params.get("tied_output") and name == "output.weight")}
    paths = files.write_split(folder / "model.gguf", fields, files.quantised(stored, kind), n_files)
    return _build(paths[0], None, _write_adapters(folder, adapters, params, weights))


KINDS: dict[str, Callable[[Path], Build]] = {
    "Meta, 1 shard": meta,
    "Meta, 2 shards": partial(meta, shards=2),
    "Meta, 2 shards, biases": partial(meta, shards=2, **BIASES),
    "Meta, scaled rope": partial(meta, use_scaled_rope=True),
    "Meta, rope factors": partial(meta, use_scaled_rope=False, rope_type="factors", rope_factors=[1.0, 2.0, 3.0, 8.0]),
    "Meta, adapter": partial(meta, adapters=1),
    "Meta, 2 shards, two adapters": partial(meta, shards=2, adapters=2),
    "Meta, Llama 2": llama2,
    "Hugging Face, one file": huggingface,
    "Hugging Face, several files": partial(huggingface, max_shard_size="100KB"),
    "Hugging Face, tied": partial(huggingface, tied_output=True),
    "Hugging Face, padded vocabulary": partial(huggingface, tokenizer="ranks", vocab_size=640),
    "Hugging Face, head_dim": partial(huggingface, head_dim=16),
    "Hugging Face, biases": partial(huggingface, **BIASES),
    "Hugging Face, biases, adapter": partial(huggingface, adapters=1, **BIASES),
    "Hugging Face, linear rope": partial(huggingface, rope_parameters=LINEAR),
    "Hugging Face, llama3 rope": partial(huggingface, use_scaled_rope=True),
    "Hugging Face, yarn rope": partial(huggingface, rope_parameters=YARN),
    "Hugging Face, adapter": partial(huggingface, adapters=1),
    "Hugging Face, several files, two adapters": partial(huggingface, adapters=2, max_shard_size="100KB"),
    "Hugging Face, no template": partial(huggingface, has_template=False),
    "GGUF, F16": partial(gguf, kind="F16"),
    "GGUF, Q8_0": partial(gguf, kind="Q8_0"),
    "GGUF, Q4_0": partial(gguf, kind="Q4_0"),
    "GGUF, three files": partial(gguf, kind="F16", n_files=3),
    "GGUF, tied": partial(gguf, kind="Q8_0", tied_output=True, seed=4),
    "GGUF, biases": partial(gguf, kind="F16", seed=3, **BIASES),
    "GGUF, linear rope": partial(gguf, kind="F16", rope={"type": "linear", "factor": 4.0}),
    "GGUF, yarn rope": partial(gguf, kind="F16", rope={"type": "yarn", "factor": 4.0, "original_context_length": 16}),
    "GGUF, adapter": partial(gguf, kind="Q8_0", adapters=1),
    "GGUF, SentencePiece": partial(gguf, kind="Q8_0", tokenizer="sentencepiece"),
    "GGUF, no template": partial(gguf, kind="Q8_0", has_template=False),
    **{
        f"Hugging Face, {name} tokenizer": partial(huggingface, tokenizer=name)
        for name in ("ranks", "sentencepiece", *PIPELINES)
        if name != "byte-level"  # which the others have
    },
}
WITHOUT_CHAT = {"Meta, Llama 2", "Hugging Face, no template", "GGUF, no template"}


def write_kinds(root: Path) -> dict[str, Build]:
    """Write a model of each kind into a folder of its own; those of GGUF only if its package is installed."""
    has_gguf = find_spec("gguf") is not None
    writers = {name: write for name, write in KINDS.items() if has_gguf or not name.startswith("GGUF")}
    return {name: write(root / str(number)) for number, (name, write) in enumerate(writers.items())}


def _build(ckpt_dir: Path, tokenizer: Path | None = None, adapters: list[Path] | None = None) -> Build:
    return {
        "ckpt_dir": str(ckpt_dir),
        "tokenizer_path": None if tokenizer is None else str(tokenizer),
        "adapter": [str(one) for one in adapters or ()],
    }


def _write_adapters(base: Path, count: int, params: Params, weights: Weights) -> list[Path]:
    return [
        write_adapter(base.with_name(f"{base.name} adapter {number}"), random_factors(params, weights, targets, number))
        for number, targets in enumerate(ADAPTER_TARGETS[:count])
    ]


def _padded(n_words: int) -> int:
    """The vocabulary of a tokenizer with padding to whole multiples of 64, as models are trained."""
    return -(-n_words // 64) * 64
