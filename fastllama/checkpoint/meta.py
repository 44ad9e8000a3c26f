"""Meta's checkpoints: params.json beside any number of `*.pth` files, each a slice of every weight.

Which slice a file is follows from the number in its name. How many there are, on which axis the embedding is cut (Llama
3: vocabulary, Llama 2: width) and whether kv heads repeat (more shards than kv heads) is not written anywhere; the
shapes tell. What several shards hold must be the same in all.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs, ffn_width
from fastllama.checkpoint.base import (
    Checkpoint,
    check_dims,
    check_names,
    check_shapes,
    count_layers,
    file_sizes,
    head_dim_of,
)
from fastllama.checkpoint.consistency import Copies, check_order, check_parts_differ, same_values, warn_of_frequencies
from fastllama.checkpoint.json_config import MOST_LAYERS, JsonConfig, listing, shown
from fastllama.checkpoint.pth_shard import FREQUENCIES, Shard, check_same_tensors, load_shard
from fastllama.checkpoint.sharding import EMBEDDING_NAME, OUTPUT_NAME, Piece, Stored, Weight, names, weights
from fastllama.checkpoint.weight_files import WeightFiles, in_order, meta_files

logger = logging.getLogger(__name__)

PARAMS_NAME = "params.json"
SPLIT_NAME = "layers.0.attention.wq.weight"

# Meta's defaults for fields that params.json may leave out.
MULTIPLE_OF = 256
NORM_EPS = 1e-5
ROPE_THETA = 500000.0

META_FIELDS = frozenset(
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    | {"norm_eps", "rope_theta", "use_scaled_rope"}
)
# What our ModelArgs has beyond Meta's, so that a params.json may state it.
OWN_FIELDS = frozenset({"head_dim", "hidden_dim", "tied_output"})
ROPE_NUMBERS = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
ROPE_INTEGERS = ("rope_original_max_seq_len",)
# Limits of a run rather than of the weights: the caller of Llama.build sets them.
IGNORED_FIELDS = frozenset({"max_batch_size", "max_seq_len"})
QUANTISED_FIELDS = ("quantization_args", "lora_args")
KNOWN_FIELDS = META_FIELDS.union(OWN_FIELDS, ROPE_NUMBERS, ROPE_INTEGERS, IGNORED_FIELDS, QUANTISED_FIELDS)
VISION_PREFIX = "vision_"


def open_meta(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that holds params.json and `*.pth`; ValueError where anything is not as it must be."""
    fields = JsonConfig.read(folder / PARAMS_NAME)
    params = _params(fields)
    files = meta_files(folder)
    paths = in_order(folder, files.taken)
    shards = [load_shard(path) for path in paths]
    check_order(shards)
    check_same_tensors(shards)

    first = shards[0].tensors
    expected = names(params["n_layers"])
    if params["tied_output"] and OUTPUT_NAME not in first:
        expected.remove(OUTPUT_NAME)
    check_names(paths[0], expected, first, _hint(fields, expected, first))
    if len(shards) > 1:
        check_parts_differ(shards, SPLIT_NAME)
    embedding_axis = _resolve_vocabulary(files, params, shards)

    stored = {}
    table = [weight for weight in weights(params) if weight.name in first]
    for weight in table:
        axis = embedding_axis if weight.name == EMBEDDING_NAME else weight.axis
        stored[weight.name] = Stored(_distinct_pieces(weight, axis, shards), axis or 0)
    shapes = {weight.name: (weight.shape, stored[weight.name].shape) for weight in table}
    check_shapes(folder, f"{PARAMS_NAME} asks for of {len(files.taken)} joined shards", shapes)
    _check_copies(paths[0], [piece for one in stored.values() for piece in one.pieces if isinstance(piece, Copies)])
    warn_of_frequencies(paths[0], FREQUENCIES, shards[0].frequencies, params)
    params["tied_output"] = _is_tied(fields, params["tied_output"], shards, stored)
    return Checkpoint(
        path=folder,
        format="meta",
        params=params,
        files=file_sizes(paths),
        dtype=stored[EMBEDDING_NAME].dtype,
        stop_token_ids=(),
        stored=stored,
        passed_over=tuple(files.passed_over),
    )


def _params(fields: JsonConfig) -> dict[str, Any]:
    """params.json as ModelArgs fields; vocab_size is -1 where only the embedding tells."""
    for key in QUANTISED_FIELDS:
        if fields.has(key):
            raise ValueError(f"{fields.path}: {key} marks a quantised checkpoint; use the original bfloat16 weights")
    if any(key.startswith(VISION_PREFIX) for key in fields.values):
        raise ValueError(f"{fields.path}: is a vision model; fastllama reads text models only")
    fields.refuse_unknown(KNOWN_FIELDS)

    dim, n_heads = fields.integer("dim"), fields.integer("n_heads")
    multiple_of, multiplier = fields.integer("multiple_of", MULTIPLE_OF), fields.number("ffn_dim_multiplier", 1.0)
    width = ffn_width(dim, multiplier, multiple_of)
    if not fields.has("hidden_dim") and not 1 <= width < 2**31:
        raise fields.error("ffn_dim_multiplier", f"a factor that gives a sensible width (this gives {shown(width)})")
    if not fields.has("rope_theta"):
        logger.warning("%s has no rope_theta; Llama 3's %.0f is used (Llama 2 needs 10000)", fields.path, ROPE_THETA)
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": fields.integer("n_layers", most=MOST_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("n_kv_heads", n_heads),
        "vocab_size": -1 if fields.values.get("vocab_size") == -1 else fields.integer("vocab_size", -1),
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier if fields.has("ffn_dim_multiplier") else None,
        "norm_eps": fields.number("norm_eps", NORM_EPS),
        "rope_theta": fields.number("rope_theta", ROPE_THETA),
        "use_scaled_rope": fields.flag("use_scaled_rope"),
        "head_dim": head_dim_of(fields, dim, n_heads),
        "hidden_dim": fields.integer("hidden_dim", width),
        "tied_output": fields.flag("tied_output"),
    }
    if params["hidden_dim"] != width:
        fields.warn(f"hidden_dim={params['hidden_dim']} is used; ffn_dim_multiplier and multiple_of would give {width}")
    params |= _scaled_rope(fields)
    check_dims(fields, params)
    return params


def _scaled_rope(fields: JsonConfig) -> dict[str, Any]:
    """How rope is scaled, as far as params.json says; ValueError where only use_scaled_rope could tell whether."""
    stated: dict[str, Any] = {key: fields.number(key) for key in ROPE_NUMBERS if fields.has(key)}
    stated |= {key: fields.integer(key) for key in ROPE_INTEGERS if fields.has(key)}
    if stated and not fields.has("use_scaled_rope"):
        raise fields.error("use_scaled_rope", f"true or false beside {', '.join(stated)}")
    if stated.get("rope_scaling_factor", 1.0) != 1.0 and not fields.flag("use_scaled_rope"):
        fields.warn(f"use_scaled_rope is false, so rope_scaling_factor={stated['rope_scaling_factor']} has no effect")
    low, high = (stated.get(key, getattr(ModelArgs, key)) for key in ("rope_low_freq_factor", "rope_high_freq_factor"))
    if low >= high:
        raise ValueError(
            f"{fields.path}: expected rope_high_freq_factor above rope_low_freq_factor, got {high} and {low}"
        )
    return stated


def _hint(fields: JsonConfig, expected: Sequence[str], found: Mapping[str, torch.Tensor]) -> str:
    """What a difference between the names that params.json asks for and those that are there may come from."""
    stated = fields.integer("n_layers")
    layers = count_layers(found)
    if layers not in (0, stated):
        return f"{PARAMS_NAME} says n_layers={stated}, the files have {layers} layers"
    if OUTPUT_NAME in expected and OUTPUT_NAME not in found:
        return f"where the output is the embedding, say so in {PARAMS_NAME}: tied_output true"
    return ""


def _check_copies(first: Path, copies: Sequence[Copies]) -> None:
    """ValueError where what all files should share is another tensor in one; a warning where it has drifted."""
    drifted = [one.name for one in copies if one.samples_differ()]
    if drifted:
        logger.warning(
            "%s: %s differ from those in the other shards, as is known of Llama 3 70B; this file's are used. "
            "Where the shards may be of two fine-tuned models, download all of one",
            first,
            listing(list(dict.fromkeys(drifted))),
        )


def _is_tied(fields: JsonConfig, stated: bool, shards: Sequence[Shard], stored: Mapping[str, Stored]) -> bool:
    """Whether the output is the embedding: where params.json says so and no other is stored, or they share storage."""
    if OUTPUT_NAME not in stored:
        return True
    if all(_shares_storage(shard.tensors) for shard in shards):  # torch.save writes what is shared once
        return True
    if not stated or same_values(stored[EMBEDDING_NAME], stored[OUTPUT_NAME]):
        return stated
    fields.warn(f"tied_output is true, but {OUTPUT_NAME} is stored and is not {EMBEDDING_NAME}; the stored one is used")
    return False


def _shares_storage(shard: Mapping[str, torch.Tensor]) -> bool:
    output, embedding = shard[OUTPUT_NAME], shard[EMBEDDING_NAME]
    same_layout = output.shape == embedding.shape and output.stride() == embedding.stride()
    return same_layout and output.data_ptr() == embedding.data_ptr()


def _resolve_vocabulary(files: WeightFiles, params: dict[str, Any], shards: Sequence[Shard]) -> int:
    """Sets vocab_size where the file left it open, and returns the axis on which the embedding is cut."""
    shape, n_shards = tuple(shards[0].tensors[EMBEDDING_NAME].shape), len(shards)
    for axis, joined in _joinings(shape, n_shards):
        if joined[1] == params["dim"] and params["vocab_size"] in (-1, joined[0]):
            params["vocab_size"] = joined[0]
            return axis
    expected = ("V" if params["vocab_size"] == -1 else params["vocab_size"], params["dim"])
    others = listing([path.name for path, _ in files.passed_over])
    raise ValueError(
        f"{shards[0].path.parent}: {EMBEDDING_NAME}: expected ({expected[0]}, {expected[1]}) from {n_shards} shards, "
        f"got shards of {shape}; compare {PARAMS_NAME} and the number of files"
        + (f" ({others} passed over)" if others else "")
    )


def _joinings(shape: tuple[int, ...], n_shards: int) -> Iterator[tuple[int, tuple[int, int]]]:
    if len(shape) == 2:
        yield 0, (shape[0] * n_shards, shape[1])
        yield 1, (shape[0], shape[1] * n_shards)


def _distinct_pieces(weight: Weight, axis: int | None, shards: Sequence[Shard]) -> tuple[Piece, ...]:
    """One piece where all shards hold the same; one per kv head where neighbouring shards share a head."""
    tensors = [shard.tensors[weight.name] for shard in shards]
    shared_by = 1
    if axis is None:
        shared_by = len(shards)
    elif weight.kv_heads and tensors[0].shape == (weight.shape[0] // weight.kv_heads, weight.shape[1]):
        shared_by = max(1, len(shards) // weight.kv_heads)
    if shared_by == 1:
        return tuple(tensors)
    paths = [shard.path for shard in shards]
    groups = [slice(begin, begin + shared_by) for begin in range(0, len(shards), shared_by)]
    return tuple(Copies(weight.name, tensors[group], paths[group]) for group in groups)
