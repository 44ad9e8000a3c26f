"""Writes small checkpoints for tests, Meta's and Hugging Face's, without using code of fastllama.

    params = tiny_params(n_kv_heads=4)              # ModelArgs keywords, also the content of params.json
    weights = random_weights(params, seed=0)        # the complete model, float32, in Meta's names
    write_meta(folder, params, weights, shards=2)   # params.json, consolidated.00.pth, consolidated.01.pth
    write_tokenizer(folder, n_ranks=320)            # tokenizer.model for vocab_size 576, tiny_params' own
    write_huggingface(folder, params, weights)      # config.json, model.safetensors, through transformers

All sizes that model parallelism splits are divisible by eight, so a model works with 1, 2, 4 and 8 processes.
"""

import base64
import json
import math
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Any]
Weights = dict[str, Tensor]

N_SPECIAL_TOKENS = 256
N_RANKS = 320

# The axis that model parallelism splits; None: every process has the complete weight.
SPLIT_AXIS = {
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "w1": 0,
    "w3": 0,
    "wo": 1,
    "w2": 1,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
}
HUGGINGFACE_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def tiny_params(**changes: Any) -> Params:
    """params.json of a two-layer model with eight heads over two kv heads; `changes` replace or add fields."""
    params: Params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 2,
        "vocab_size": N_RANKS + N_SPECIAL_TOKENS,
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    return {**params, **changes}


def head_dim(params: Params) -> int:
    return int(params.get("head_dim") or params["dim"] // params["n_heads"])


def n_kv_heads(params: Params) -> int:
    return int(params.get("n_kv_heads") or params["n_heads"])


def hidden_dim(params: Params) -> int:
    """hidden_dim if params has it, else by Meta's formula."""
    if params.get("hidden_dim"):
        return int(params["hidden_dim"])
    width = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * params["dim"] / 3))
    multiple = int(params.get("multiple_of", 256))
    return multiple * ((width + multiple - 1) // multiple)


def random_weights(params: Params, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """The weights of a complete model in Meta's names; its logits have a standard deviation of about 2.

    With `tied_output` the output is the embedding, the same tensor object.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, ffn, vocabulary = params["dim"], hidden_dim(params), params["vocab_size"]
    q_rows, kv_rows = params["n_heads"] * head_dim(params), n_kv_heads(params) * head_dim(params)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(dim, generator=generator)).to(dtype)

    def add(prefix: str, sizes: dict[str, int], columns: int, has_bias: bool) -> None:
        """Add modules with the same input, given their rows: the matrices, then the biases."""
        weights.update({f"{prefix}{name}.weight": matrix(rows, columns) for name, rows in sizes.items()})
        if has_bias:
            weights.update({f"{prefix}{name}.bias": matrix(rows, 1)[:, 0] for name, rows in sizes.items()})

    attention_bias, mlp_bias = params.get("attention_bias", False), params.get("mlp_bias", False)
    weights = {"tok_embeddings.weight": matrix(vocabulary, dim, gain=2.0)}
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        weights[f"{prefix}attention_norm.weight"] = norm()
        qkv = {"attention.wq": q_rows, "attention.wk": kv_rows, "attention.wv": kv_rows}
        add(prefix, qkv, dim, attention_bias)
        add(prefix, {"attention.wo": dim}, q_rows, attention_bias)
        weights[f"{prefix}ffn_norm.weight"] = norm()
        add(prefix, {"feed_forward.w1": ffn, "feed_forward.w3": ffn}, dim, mlp_bias)
        add(prefix, {"feed_forward.w2": dim}, ffn, mlp_bias)
    weights["norm.weight"] = norm()
    tied = params.get("tied_output")
    weights["output.weight"] = weights["tok_embeddings.weight"] if tied else matrix(vocabulary, dim, gain=2.0)
    return weights


def share(params: Params, name: str, weight: Tensor, rank: int, world_size: int, axis: int | None = None) -> Tensor:
    """The part of a weight for process `rank`; kv heads repeat if there are fewer heads than processes."""
    part = name.split(".")[-2]
    axis = SPLIT_AXIS[part] if axis is None else axis
    if axis is None or axis >= weight.ndim:
        return weight
    if part in ("wk", "wv") and world_size > n_kv_heads(params):
        heads = weight.view(n_kv_heads(params), -1, *weight.shape[1:])
        weight = heads.repeat_interleave(world_size // n_kv_heads(params), dim=0).flatten(0, 1)
    return weight.chunk(world_size, axis)[rank]


def write_meta(
    folder: Path,
    params: Params,
    weights: Weights,
    shards: int = 1,
    embedding_axis: int = 0,
    dtype: torch.dtype | None = None,
    **params_json: Any,
) -> Path:
    """Write params.json and consolidated.NN.pth; embedding_axis 1 is Llama 2's layout.

    With more shards than kv heads, each shard holds one head, and adjacent shards repeat it. A tied output shares the
    embedding's storage, as in Meta's 3.2 files. `params_json` replaces or adds fields in params.json only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stated = {key: value for key, value in params.items() if key != "tied_output" and value is not None}
    (folder / "params.json").write_text(json.dumps({**stated, **params_json}))
    tied = weights.get("output.weight") is weights.get("tok_embeddings.weight")
    for rank in range(shards):
        shard = {}
        for name, weight in weights.items():
            axis = embedding_axis if name.startswith("tok_embeddings") else None
            # A clone, because torch.save writes the whole storage of a view.
            shard[name] = share(params, name, weight, rank, shards, axis).to(dtype or weight.dtype).clone()
        if tied and embedding_axis == 0:
            shard["output.weight"] = shard["tok_embeddings.weight"]
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def write_tokenizer(folder: Path, n_ranks: int = N_RANKS, swapped: tuple[int, int] | None = None) -> Path:
    """Write tokenizer.model: all bytes and `n_ranks` - 256 tokens of two letters; vocab_size is n_ranks + 256.

    swapped: two tokens that change places.
    """
    pairs = [" " + letter for letter in ascii_lowercase] + [a + b for a in ascii_lowercase for b in ascii_lowercase]
    tokens = [bytes([byte]) for byte in range(256)] + [pair.encode() for pair in pairs]
    if not 256 <= n_ranks <= len(tokens):
        raise ValueError(f"expected 256 to {len(tokens)} ranks, got {n_ranks}")
    if swapped is not None:
        one, other = swapped
        tokens[one], tokens[other] = tokens[other], tokens[one]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens[:n_ranks])]
    path.write_text("\n".join(lines) + "\n")
    return path


def huggingface_weights(params: Params, weights: Weights) -> Weights:
    """The weights in transformers' names. The rows of q and k are reordered from rotary pairs to halves."""
    outer = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    theirs = {}
    for name, weight in weights.items():
        part, _, kind = name.rpartition(".")
        if part in outer:
            theirs[f"{outer[part]}.{kind}"] = weight
            continue
        _, layer, part = part.split(".", 2)
        if part in ("attention.wq", "attention.wk"):
            half = head_dim(params) // 2
            pairs = weight.view(-1, half, 2, *weight.shape[1:])
            weight = torch.stack((pairs[:, :, 0], pairs[:, :, 1]), dim=1).reshape(weight.shape)
        theirs[f"model.layers.{layer}.{HUGGINGFACE_LAYER_NAMES[part]}.{kind}"] = weight
    return theirs


def huggingface_model(params: Params, weights: Weights, rope_parameters: Params | None = None) -> Any:
    """transformers' LlamaForCausalLM with these weights, in eval mode.

    rope_parameters: of its configuration, beside rope_theta; None means those that `params` gives.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: Params = {"rope_type": "default", "rope_theta": params["rope_theta"], **(rope_parameters or {})}
    if params.get("use_scaled_rope"):
        rope |= {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor", 8.0),
            "low_freq_factor": params.get("rope_low_freq_factor", 1.0),
            "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
            "original_max_position_embeddings": params.get("rope_original_max_seq_len", 8192),
        }
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=hidden_dim(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=n_kv_heads(params),
        head_dim=head_dim(params),
        rms_norm_eps=params["norm_eps"],
        rope_parameters=rope,
        max_position_embeddings=131072,
        tie_word_embeddings=bool(params.get("tied_output")),
        attention_bias=bool(params.get("attention_bias")),
        mlp_bias=bool(params.get("mlp_bias")),
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(huggingface_weights(params, weights))
    return model.eval()


def write_huggingface(
    folder: Path,
    params: Params,
    weights: Weights,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    eos_token_id: int | list[int] | None = None,
    old_fields: bool = False,
    rope_parameters: Params | None = None,
) -> Path:
    """Write the folder that transformers saves; a small `max_shard_size` gives shards with an index.

    old_fields: config.json as transformers 4 wrote it (rope_theta, rope_scaling, torch_dtype, no head_dim).
    eos_token_id: written to generation_config.json and config.json.
    rope_parameters: as in `huggingface_model`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = huggingface_model(params, weights, rope_parameters).to(dtype or weights["tok_embeddings.weight"].dtype)
    model.config.eos_token_id = model.generation_config.eos_token_id = eos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if old_fields:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if params["dim"] == params["n_heads"] * head_dim(params):
            del config["head_dim"]
        path.write_text(json.dumps(config))
    return folder
