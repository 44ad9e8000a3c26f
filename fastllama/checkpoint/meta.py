"""Opens Meta's checkpoints: params.json beside any number of `*.pth` files, each with a slice of every weight.

The number in a file's name says which slice it holds. No file states the number of shards, the split axis of the
embedding (Llama 3: vocabulary, Llama 2: width) or whether kv heads repeat (more shards than kv heads): they follow from
the shapes. Tensors that several shards hold must agree.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME, ROPE_FIELDS, ModelArgs, ffn_width
from fastllama.checkpoint.base import (
    Checkpoint,
    check_dims,
    check_names,
    check_shapes,
    count_layers,
    file_sizes,
    read_head_dim,
)
from fastllama.checkpoint.consistency import (
    ReplicatedShard,
    check_shard_order,
    check_slices_differ,
    same_values,
    warn_if_frequencies_differ,
)
from fastllama.checkpoint.json_config import MAX_LAYERS, JsonConfig, short_list, short_repr
from fastllama.checkpoint.pth_shard import ROPE_FREQS_NAME, Shard, check_same_tensors, load_shard
from fastllama.checkpoint.sharding import (
    BIAS_SUFFIX,
    ShardedTensor,
    TensorShard,
    WeightSpec,
    weight_names,
    weight_specs,
)
from fastllama.checkpoint.weight_files import WeightFiles, meta_files, sort_shards

logger = logging.getLogger(__name__)

PARAMS_NAME = "params.json"
# Shards whose slices of this weight are equal are copies of each other.
COPY_CHECK_NAME = "layers.0.attention.wq.weight"

# Meta's defaults for fields that params.json may omit.
MULTIPLE_OF = 256
NORM_EPS = 1e-5
ROPE_THETA = 500000.0

META_FIELDS = frozenset(
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    | {"norm_eps", "rope_theta", "use_scaled_rope"}
)
# Fields of fastllama's ModelArgs that Meta's does not have; params.json may state them.
OWN_FIELDS = frozenset({"head_dim", "hidden_dim", "tied_output", "attention_bias", "mlp_bias"})
ROPE_NUMBERS = (
    *("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_attention_factor", "rope_beta_fast", "rope_beta_slow"),
)
ROPE_INTEGERS = ("rope_original_max_seq_len",)
ROPE_TYPE, ROPE_TRUNCATE, ROPE_FACTORS = "rope_type", "rope_truncate", "rope_factors"
# Limits of a run, not of the weights: the caller of Llama.build sets them.
IGNORED_FIELDS = frozenset({"max_batch_size", "max_seq_len", "cache_tokens"})
QUANTISED_FIELDS = ("quantization_args", "lora_args")
KNOWN_FIELDS = META_FIELDS.union(
    OWN_FIELDS, ROPE_NUMBERS, ROPE_INTEGERS, {ROPE_TYPE, ROPE_TRUNCATE, ROPE_FACTORS}, IGNORED_FIELDS, QUANTISED_FIELDS
)
VISION_PREFIX = "vision_"


def open_meta(folder: Path) -> Checkpoint:
    """The checkpoint in a folder with params.json and `*.pth`. ValueError if any check fails."""
    config = JsonConfig.read(folder / PARAMS_NAME)
    params = _read_params(config)
    files = meta_files(folder)
    paths = sort_shards(folder, files.chosen)
    shards = [load_shard(path) for path in paths]
    check_shard_order(shards)
    check_same_tensors(shards)

    first = shards[0].tensors
    expected = weight_names(params)
    if params["tied_output"] and OUTPUT_NAME not in first:
        expected.remove(OUTPUT_NAME)
    check_names(paths[0], expected, first, _name_hint(config, expected, first))
    if len(shards) > 1:
        check_slices_differ(shards, COPY_CHECK_NAME)
    embedding_axis = _resolve_vocabulary(files, params, shards)

    stored = {}
    specs = [spec for spec in weight_specs(params) if spec.name in first]
    for spec in specs:
        axis = embedding_axis if spec.name == EMBEDDING_NAME else spec.split_axis
        stored[spec.name] = ShardedTensor(_tensor_shards(spec, axis, shards), axis or 0)
    shapes = {spec.name: (spec.shape, stored[spec.name].shape) for spec in specs}
    check_shapes(folder, f"{PARAMS_NAME} requires for {len(files.chosen)} joined shards", shapes)
    tensor_shards = [shard for tensor in stored.values() for shard in tensor.shards]
    _check_replicas(paths[0], [shard for shard in tensor_shards if isinstance(shard, ReplicatedShard)])
    warn_if_frequencies_differ(paths[0], ROPE_FREQS_NAME, shards[0].rope_freqs, params)
    params["tied_output"] = _is_tied(config, params["tied_output"], shards, stored)
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


def _read_params(config: JsonConfig) -> dict[str, Any]:
    """params.json as ModelArgs fields. vocab_size is -1 if only the embedding's shape gives it."""
    for key in QUANTISED_FIELDS:
        if config.has(key):
            raise ValueError(f"{config.path}: {key} marks a quantised checkpoint; use the original bfloat16 weights")
    if any(key.startswith(VISION_PREFIX) for key in config.values):
        raise ValueError(f"{config.path}: is a vision model; fastllama reads text models only")
    config.refuse_unknown(KNOWN_FIELDS)

    dim, n_heads = config.integer("dim"), config.integer("n_heads")
    multiple_of, multiplier = config.integer("multiple_of", MULTIPLE_OF), config.number("ffn_dim_multiplier", 1.0)
    width = ffn_width(dim, multiplier, multiple_of)
    if not config.has("hidden_dim") and not 1 <= width < 2**31:
        raise config.error(
            "ffn_dim_multiplier", f"a factor that gives a sensible width (this gives {short_repr(width)})"
        )
    if not config.has("rope_theta"):
        logger.warning("%s has no rope_theta; Llama 3's %.0f is used (Llama 2 needs 10000)", config.path, ROPE_THETA)
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": config.integer("n_layers", maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": config.integer("n_kv_heads", n_heads),
        "vocab_size": -1 if config.values.get("vocab_size") == -1 else config.integer("vocab_size", -1),
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier if config.has("ffn_dim_multiplier") else None,
        "norm_eps": config.number("norm_eps", NORM_EPS),
        "rope_theta": config.number("rope_theta", ROPE_THETA),
        "use_scaled_rope": config.flag("use_scaled_rope"),
        "head_dim": read_head_dim(config, dim, n_heads),
        "hidden_dim": config.integer("hidden_dim", width),
        "tied_output": config.flag("tied_output"),
        "attention_bias": config.flag("attention_bias"),
        "mlp_bias": config.flag("mlp_bias"),
    }
    if params["hidden_dim"] != width:
        config.warn(f"hidden_dim={params['hidden_dim']} is used; ffn_dim_multiplier and multiple_of would give {width}")
    check_dims(config, params)
    params |= _read_scaled_rope(config, {name: params[name] for name in ("rope_theta", "head_dim")})
    return params


def _read_scaled_rope(config: JsonConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The rope scaling fields that params.json states. ValueError if they are given without use_scaled_rope.

    ValueError also for values that ModelArgs refuses together, and with `params`.
    """
    stated: dict[str, Any] = {key: config.number(key) for key in ROPE_NUMBERS if config.has(key)}
    stated |= {key: config.integer(key) for key in ROPE_INTEGERS if config.has(key)}
    if config.has(ROPE_TRUNCATE):
        stated[ROPE_TRUNCATE] = config.flag(ROPE_TRUNCATE)
    if config.has(ROPE_FACTORS):
        stated[ROPE_FACTORS] = config.values[ROPE_FACTORS]  # ModelArgs checks them
    if config.has(ROPE_TYPE):
        stated[ROPE_TYPE] = config.values[ROPE_TYPE]
        if stated[ROPE_TYPE] not in tuple(ROPE_FIELDS):
            raise config.error(ROPE_TYPE, " or ".join(map(repr, ROPE_FIELDS)))
    if stated and not config.has("use_scaled_rope"):
        raise config.error("use_scaled_rope", f"true or false beside {', '.join(stated)}")
    try:
        args = ModelArgs(**params, use_scaled_rope=config.flag("use_scaled_rope"), **stated)
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from None
    if args.rope_type == "default" and stated.get("rope_scaling_factor", 1.0) != 1.0:
        config.warn(f"use_scaled_rope is false, so rope_scaling_factor={stated['rope_scaling_factor']} has no effect")
    return stated


def _name_hint(config: JsonConfig, expected: Sequence[str], found: Mapping[str, torch.Tensor]) -> str:
    """A possible cause if the tensors' names are not those that params.json requires; "" if none is known."""
    stated = config.integer("n_layers")
    layers = count_layers(found)
    if layers not in (0, stated):
        return f"{PARAMS_NAME} says n_layers={stated}, the files have {layers} layers"
    if any(name.endswith(".self_attn.q_proj.weight") for name in found):
        return "these are transformers' names; save them as safetensors beside config.json"
    if OUTPUT_NAME in expected and OUTPUT_NAME not in found:
        return f"if the output is tied to the embedding, set tied_output to true in {PARAMS_NAME}"
    if any(name.endswith(BIAS_SUFFIX) for name in found.keys() ^ set(expected)):
        return f"{PARAMS_NAME} says which biases there are: attention_bias for attention, mlp_bias for feed_forward"
    return ""


def _check_replicas(first: Path, replicas: Sequence[ReplicatedShard]) -> None:
    """Raise ValueError if a file's copy is unrelated to the first file's; warn if copies differ."""
    drifted = [one.name for one in replicas if one.samples_differ()]
    if drifted:
        logger.warning(
            "%s: %s differ from those in the other shards, as is known of Llama 3 70B; this file's are used. "
            "If the shards may be of two fine-tuned models, download all of one",
            first,
            short_list(list(dict.fromkeys(drifted))),
        )


def _is_tied(config: JsonConfig, stated: bool, shards: Sequence[Shard], stored: Mapping[str, ShardedTensor]) -> bool:
    """Whether the output is the embedding: they share storage, or params.json says so and no other output is stored."""
    if OUTPUT_NAME not in stored:
        return True
    if all(_shares_storage(shard.tensors) for shard in shards):  # torch.save writes shared storage once
        return True
    if not stated or same_values(stored[EMBEDDING_NAME], stored[OUTPUT_NAME]):
        return stated
    config.warn(f"tied_output is true, but {OUTPUT_NAME} is stored and is not {EMBEDDING_NAME}; the stored one is used")
    return False


def _shares_storage(tensors: Mapping[str, torch.Tensor]) -> bool:
    output, embedding = tensors[OUTPUT_NAME], tensors[EMBEDDING_NAME]
    same_layout = output.shape == embedding.shape and output.stride() == embedding.stride()
    return same_layout and output.data_ptr() == embedding.data_ptr()


def _resolve_vocabulary(files: WeightFiles, params: dict[str, Any], shards: Sequence[Shard]) -> int:
    """The split axis of the embedding. Sets vocab_size in `params` if it is -1."""
    shape, n_shards = tuple(shards[0].tensors[EMBEDDING_NAME].shape), len(shards)
    for axis, joined in _joined_shapes(shape, n_shards):
        if joined[1] == params["dim"] and params["vocab_size"] in (-1, joined[0]):
            params["vocab_size"] = joined[0]
            return axis
    expected = ("V" if params["vocab_size"] == -1 else params["vocab_size"], params["dim"])
    unused = short_list([path.name for path, _ in files.passed_over])
    raise ValueError(
        f"{shards[0].path.parent}: {EMBEDDING_NAME}: expected ({expected[0]}, {expected[1]}) from {n_shards} shards, "
        f"got shards of {shape}; compare {PARAMS_NAME} and the number of files"
        + (f" ({unused} passed over)" if unused else "")
    )


def _joined_shapes(shape: tuple[int, ...], n_shards: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(split axis, shape of the complete matrix) for both possible axes."""
    if len(shape) == 2:
        yield 0, (shape[0] * n_shards, shape[1])
        yield 1, (shape[0], shape[1] * n_shards)


def _tensor_shards(spec: WeightSpec, axis: int | None, shards: Sequence[Shard]) -> tuple[TensorShard, ...]:
    """The different shards of a weight: one if all files hold the same, one per kv head if adjacent files share it."""
    tensors = [shard.tensors[spec.name] for shard in shards]
    n_replicas = 1
    if axis is None:
        n_replicas = len(shards)
    elif spec.kv_heads and tensors[0].shape == (spec.shape[0] // spec.kv_heads, *spec.shape[1:]):
        n_replicas = max(1, len(shards) // spec.kv_heads)
    if n_replicas == 1:
        return tuple(tensors)
    paths = [shard.path for shard in shards]
    groups = [slice(begin, begin + n_replicas) for begin in range(0, len(shards), n_replicas)]
    return tuple(ReplicatedShard(spec.name, tensors[group], paths[group]) for group in groups)
