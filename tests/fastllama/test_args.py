"""ModelArgs: the published models' widths, computed fields, and values that are refused."""

import json
import math
from typing import Any

import pytest

from fastllama import ModelArgs
from fastllama.args import ROPE_FIELDS

PUBLISHED: dict[str, tuple[dict[str, Any], int, float]] = {
    "3-8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
        14336,
        8,
    ),
    "3-70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
        28672,
        8,
    ),
    "3.1-405B": (
        {
            "dim": 16384,
            "n_layers": 126,
            "n_heads": 128,
            "n_kv_heads": 8,
            "ffn_dim_multiplier": 1.2,
            "multiple_of": 4096,
        },
        53248,
        8,
    ),
    "3.2-1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
        8192,
        32,
    ),
    "3.2-3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
        8192,
        32,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    fields, hidden_dim, factor = PUBLISHED[name]
    args = ModelArgs(vocab_size=128256, use_scaled_rope=True, **fields)
    assert args.hidden_dim == hidden_dim and args.head_dim in (64, 128) and args.rope_scaling_factor == factor
    assert args.shapes["layers.0.feed_forward.w2.weight"] == (args.dim, hidden_dim)


def test_defaults_are_metas() -> None:
    args = ModelArgs()
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads) == (4096, 32, 32, 32)
    assert (args.vocab_size, args.max_batch_size, args.max_seq_len) == (-1, 32, 2048)
    assert args.head_dim == 128 and not args.use_scaled_rope
    assert ModelArgs(dim=2048, use_scaled_rope=True, rope_scaling_factor=8.0).rope_scaling_factor == 8.0


@pytest.mark.parametrize(
    ("fields", "rope_type", "attention_factor"),
    [
        ({}, "default", 1.0),
        ({"use_scaled_rope": True}, "llama3", 1.0),
        ({"rope_type": "linear", "rope_scaling_factor": 4}, "linear", 1.0),
        ({"rope_type": "yarn", "rope_scaling_factor": 4}, "yarn", 1.0 + 0.1 * math.log(4)),
        ({"rope_type": "yarn", "rope_scaling_factor": 0.5}, "yarn", 1.0),
        ({"rope_type": "yarn", "rope_scaling_factor": 4, "rope_attention_factor": 2}, "yarn", 2.0),
        ({"rope_type": "factors", "rope_factors": [1, *[2.5] * 63]}, "factors", 1.0),
        ({"rope_type": "factors", "rope_factors": (3.0,) * 64, "rope_attention_factor": 1.5}, "factors", 1.5),
        ({"use_scaled_rope": True, "rope_factors": (3.0,) * 64}, "llama3", 1.0),
    ],
)
def test_rope_fields_are_derived_and_kept(fields: dict[str, Any], rope_type: str, attention_factor: float) -> None:
    args = ModelArgs(vocab_size=512, **fields)
    assert args.rope_type == rope_type and args.rope_attention_factor == pytest.approx(attention_factor)
    assert ModelArgs(**json.loads(json.dumps(vars(args)))) == args
    part = args.split(2)
    assert {name: getattr(part, name) for name in ROPE_FIELDS[rope_type]} == {
        name: getattr(args, name) for name in ROPE_FIELDS[rope_type]
    }
    assert part.rope_type == rope_type


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"n_layers": 2.0}, "n_layers must be a positive integer, got 2.0"),
        ({"n_heads": True}, "n_heads must be"),
        ({"n_heads": 32, "n_kv_heads": 5}, "n_heads must be a multiple of n_kv_heads, got 32 and 5"),
        ({"dim": 100, "n_heads": 3}, "dim must be a multiple of n_heads, got 100 and 3"),
        ({"dim": 12, "n_heads": 4}, "head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number, got 0.0"),
        ({"rope_theta": "500000"}, "rope_theta must be"),
        ({"rope_theta": float("inf")}, "rope_theta must be"),
        ({"max_seq_len": -1}, "max_seq_len must be"),
        ({"rope_high_freq_factor": 1.0}, "rope_high_freq_factor must be above"),
        ({"rope_type": "dynamic"}, "rope_type must be one of default, linear, llama3, yarn, factors, got 'dynamic'"),
        ({"rope_type": ["yarn"]}, "rope_type must be one of"),
        ({"rope_type": "llama3"}, "use_scaled_rope must be true for rope_type 'llama3'"),
        ({"rope_type": "default", "use_scaled_rope": True}, "and false for others, got True and 'default'"),
        ({"rope_type": "linear"}, "rope_scaling_factor must be a positive number, got None"),
        ({"rope_attention_factor": 0}, "rope_attention_factor must be a positive number, got 0"),
        ({"rope_beta_fast": "32"}, "rope_beta_fast must be a positive number, got '32'"),
        ({"rope_beta_slow": 33}, "rope_beta_fast must be at least rope_beta_slow, got 32.0 and 33.0"),
        ({"rope_truncate": 1}, "rope_truncate must be true or false, got 1"),
        ({"rope_type": "yarn", "rope_scaling_factor": 4, "rope_theta": 1}, "rope_theta must be above 1"),
        ({"rope_type": "factors"}, "rope_factors must be 64 numbers, one for each frequency, got None"),
        ({"rope_type": "factors", "rope_factors": [1.0] * 63}, "rope_factors must be 64 numbers, .*, got 63 of them"),
        ({"rope_factors": "1" * 64}, "rope_factors must be 64 numbers, one for each frequency, got '1111"),
        ({"rope_factors": [1.0, 0.0] * 32}, r"rope_factors must be positive numbers up to 1e\+30, got 0.0"),
        ({"rope_factors": [-1.0] * 64}, "rope_factors must be positive numbers .*, got -1.0"),
        ({"rope_factors": [float("nan")] * 64}, "rope_factors must be positive numbers .*, got nan"),
        ({"rope_factors": [float("inf")] * 64}, "rope_factors must be positive numbers .*, got inf"),
        ({"rope_factors": [True] * 64}, "rope_factors must be positive numbers .*, got True"),
        ({"rope_factors": [1e-31] * 64}, "rope_factors must be positive numbers .*, got 1e-31"),
        ({"hidden_dim": 0}, "hidden_dim must be"),
    ],
)
def test_args_reject(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs(**fields)
