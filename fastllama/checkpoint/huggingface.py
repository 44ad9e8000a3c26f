"""Opens Hugging Face checkpoints: config.json beside safetensors, one file or several, usually with an index.

The weights are Meta's under other names. Only the rows of q and k are in another order: transformers rotates the two
halves of a head against each other, Meta rotates adjacent pairs. `SafetensorsTensor.narrow` restores Meta's order, head
by head, when a slice is read.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastllama.args import EMBEDDING_NAME, OUTPUT_NAME
from fastllama.checkpoint.base import (
    Checkpoint,
    StoredWeight,
    check_dtypes,
    check_names,
    check_shapes,
    count_layers,
    dtype_name,
    file_sizes,
)
from fastllama.checkpoint.consistency import same_values, warn_if_frequencies_differ
from fastllama.checkpoint.huggingface_config import model_params, stop_token_ids
from fastllama.checkpoint.json_config import JsonConfig
from fastllama.checkpoint.quantized_folder import Method, part_names, quantization_method, take_modules
from fastllama.checkpoint.quantized_tensor import QuantizedTensor
from fastllama.checkpoint.safetensors_files import INV_FREQ_NAME, SafetensorsTensor, find_tensors
from fastllama.checkpoint.sharding import (
    BIAS_SUFFIX,
    ShardedTensor,
    rename,
    weight_names,
    weight_specs,
)

CONFIG_NAME = "config.json"

# transformers' names, by Meta's.
OUTER_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
PERMUTED_PARTS = ("attention.wq", "attention.wk")


def open_huggingface(folder: Path) -> Checkpoint:
    """The checkpoint in a folder with config.json and safetensors. ValueError if any check fails."""
    config = JsonConfig.read(folder / CONFIG_NAME)
    params = model_params(config)
    method = quantization_method(config)
    hf_names = huggingface_names(weight_names(params))
    known = set(hf_names.values())
    names = known | part_names(method, known) if method else known
    files, tensors, frequencies = find_tensors(folder, config, names, params["tied_output"])
    quantized = take_modules(method, tensors, known) if method else {}

    check_dtypes(folder, {name: tensor.dtype_text for name, tensor in tensors.items()})
    embedding, output = hf_names[EMBEDDING_NAME], hf_names[OUTPUT_NAME]
    if params["tied_output"] and output in tensors:  # if only one of the two is stored, it is used for both
        tensors.setdefault(embedding, tensors[output])
    optional = {output} if params["tied_output"] and embedding in tensors else set()
    present = [*tensors, *(f"{module}.weight" for module in quantized)]
    expected = [name for name in hf_names.values() if name in present or name not in optional]
    check_names(folder, expected, present, _name_hint(config, expected, present))
    if params["vocab_size"] == -1:
        params["vocab_size"] = _vocabulary_size(folder, tensors[embedding].shape, params["dim"])

    stored = _stored_dense(folder, params, hf_names, tensors)
    if frequencies is not None:
        warn_if_frequencies_differ(folder, INV_FREQ_NAME, frequencies.read(), params)
    if params["tied_output"] and OUTPUT_NAME in stored:
        params["tied_output"] = _is_tied(config, stored[EMBEDDING_NAME], stored[OUTPUT_NAME])
    weights: dict[str, StoredWeight] = {**stored}
    if method:
        if params["tied_output"] and output.removesuffix(".weight") in quantized:
            config.warn(f"tie_word_embeddings is true, but a quantised {output} is stored, which is used")
            params["tied_output"] = False
        weights |= _stored_quantized(folder, params, hf_names, method, quantized)
    return Checkpoint(
        path=folder,
        format="huggingface",
        params=params,
        files=file_sizes(files.chosen),
        dtype=stored[EMBEDDING_NAME].dtype,
        stop_token_ids=stop_token_ids(folder, config),
        stored=weights,
        passed_over=tuple(files.passed_over),
        bytes_by_type=_bytes_by_precision(weights) if quantized else {},
    )


def _stored_dense(
    folder: Path, params: Mapping[str, Any], hf_names: Mapping[str, str], tensors: Mapping[str, SafetensorsTensor]
) -> dict[str, ShardedTensor]:
    """The weights that are not quantised. ValueError for wrong shapes."""
    stored, shapes = {}, {}
    for spec in weight_specs(params):
        name = hf_names[spec.name]
        if name not in tensors:
            continue
        tensor = tensors[name]
        shapes[name] = (spec.shape, tensor.shape)
        if _is_permuted(spec.name):
            tensor.head_dim = params["head_dim"]
        stored[spec.name] = ShardedTensor((tensor,))
    check_shapes(folder, f"{CONFIG_NAME} requires", shapes)
    return stored


def _stored_quantized(
    folder: Path,
    params: Mapping[str, Any],
    hf_names: Mapping[str, str],
    method: Method,
    modules: Mapping[str, dict[str, SafetensorsTensor]],
) -> dict[str, QuantizedTensor]:
    """The quantised weights. ValueError for parts of wrong shapes."""
    stored = {}
    for spec in weight_specs(params):
        module = hf_names[spec.name].removesuffix(".weight")
        if spec.name.endswith(".weight") and module in modules:
            tensor = method.tensor(folder, module, modules[module], (spec.shape[0], spec.shape[1]))
            tensor.head_dim = params["head_dim"] if _is_permuted(spec.name) else None
            stored[spec.name] = tensor
    return stored


def _bytes_by_precision(weights: Mapping[str, StoredWeight]) -> dict[str, int]:
    """The bytes of the weights of each precision, the largest first."""
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        if isinstance(weight, QuantizedTensor):
            sizes[weight.description] += weight.n_bytes
        else:
            sizes[dtype_name(weight.dtype)] += math.prod(weight.shape) * weight.dtype.itemsize
    return dict(sizes.most_common())


def _is_permuted(name: str) -> bool:
    return any(f".{part}." in name for part in PERMUTED_PARTS)


def _is_tied(config: JsonConfig, embedding: ShardedTensor, output: ShardedTensor) -> bool:
    """Whether a stored output, which config.json says is tied, equals the embedding."""
    if embedding.shards[0] is output.shards[0] or same_values(embedding, output):
        return True
    config.warn(
        "tie_word_embeddings is true, but lm_head.weight is stored and is not model.embed_tokens.weight; "
        "the stored one is used, as in transformers"
    )
    return False


def _name_hint(config: JsonConfig, expected: Collection[str], found: Collection[str]) -> str:
    """A possible cause if the tensors' names are not those that config.json requires; "" if none is known."""
    missing, unexpected = set(expected) - set(found), set(found) - set(expected)
    stated, layers = config.integer("num_hidden_layers"), count_layers(found)
    if layers not in (0, stated):
        return f"{CONFIG_NAME} says num_hidden_layers={stated}, the files have {layers} layers"
    if any(name.endswith(f"_proj{BIAS_SUFFIX}") for name in missing | unexpected):
        return f"{CONFIG_NAME} says which biases there are: attention_bias for self_attn, mlp_bias for mlp"
    if missing == {f"{OUTER_NAMES['output']}.weight"}:
        return (
            f"{CONFIG_NAME} does not set tie_word_embeddings to true, so there must be an output: "
            "a base model alone (LlamaModel) has none"
        )
    if any(name.endswith(".attention.wq.weight") for name in unexpected):
        return "these are Meta's names; save them with torch.save as consolidated.00.pth beside params.json"
    first = OUTER_NAMES["norm"] + ".weight"
    prefixes = [name.removesuffix(first) for name in unexpected if name.endswith("." + first)]
    return f"names begin with {prefixes[0]!r}, a prefix of another program: remove it" if prefixes else ""


def huggingface_names(names: Iterable[str]) -> dict[str, str]:
    """transformers' names of weights, by Meta's."""
    return {name: rename(name, OUTER_NAMES, "model.layers", LAYER_NAMES) for name in names}


def _vocabulary_size(folder: Path, shape: tuple[int, ...], dim: int) -> int:
    """The embedding's rows. ValueError if its shape is not (V, dim)."""
    if len(shape) != 2 or shape[1] != dim:
        raise ValueError(f"{folder}: {OUTER_NAMES['tok_embeddings']}.weight: expected (V, {dim}), got {shape}")
    return shape[0]
