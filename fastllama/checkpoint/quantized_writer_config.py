"""The config.json of a quantised folder: the model's fields in transformers' names, and the scheme of its weights."""

from typing import Any

from fastllama.args import ModelArgs
from fastllama.checkpoint.base import Checkpoint, dtype_name
from fastllama.checkpoint.huggingface import CONFIG_NAME
from fastllama.checkpoint.json_config import JsonConfig
from fastllama.quantization import Scheme

LAYOUTS = {"int8": "pack-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}
LINEAR = "Linear"
MAX_POSITIONS, MAX_POSITIONS_SCALED = 8192, 131072


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a checkpoint: its own in Hugging Face's layout, else one with the same meaning.

    ValueError for a rope that transformers does not have.
    """
    if checkpoint.format == "huggingface":
        values = dict(JsonConfig.read(checkpoint.path / CONFIG_NAME).values)
        values.pop("transformers_weights", None)
        return {"architectures": ["LlamaForCausalLM"]} | values
    args = ModelArgs(**checkpoint.params)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "max_position_embeddings": MAX_POSITIONS if args.rope_type == "default" else MAX_POSITIONS_SCALED,
        "rope_theta": args.rope_theta,
        "rope_scaling": _rope_scaling(checkpoint, args),
        "torch_dtype": dtype_name(checkpoint.dtype),
    }


def _rope_scaling(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, Any] | None:
    kind: dict[str, Any] = {"rope_type": args.rope_type, "factor": args.rope_scaling_factor}
    original = {"original_max_position_embeddings": args.rope_original_max_seq_len}
    if args.rope_type == "default":
        return None
    if args.rope_type == "linear":
        return kind
    if args.rope_type == "llama3":
        frequencies = {"low_freq_factor": args.rope_low_freq_factor, "high_freq_factor": args.rope_high_freq_factor}
        return kind | original | frequencies
    if args.rope_type == "yarn":
        names = ("attention_factor", "beta_fast", "beta_slow", "truncate")
        return kind | original | {name: getattr(args, f"rope_{name}") for name in names}
    raise ValueError(
        f"{checkpoint.path}: its rope_type {args.rope_type!r} has a factor for each frequency, which transformers' "
        "Llama does not have; quantise it while it is loaded, with --quantize"
    )


def quantization_config(scheme: Scheme, with_output: bool) -> dict[str, Any]:
    """The section quantization_config, in which all linear layers have one scheme."""
    is_int4, layout = scheme.format == "int4", LAYOUTS[scheme.format]
    weights = {
        "num_bits": 4 if is_int4 else 8,
        "type": "float" if scheme.format == "fp8" else "int",
        "symmetric": not is_int4,
        "strategy": "group" if is_int4 else "channel",
        "group_size": scheme.group_size if is_int4 else None,
        "dynamic": False,
    }
    group = {"targets": [LINEAR], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [] if with_output else ["lm_head"],
    }
