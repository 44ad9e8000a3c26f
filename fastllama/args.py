"""ModelArgs: Meta's params.json as a checked dataclass, and the shape of every weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

UNSET: Any = None  # the default of a field whose value follows from other fields
UNKNOWN_VOCAB_SIZE = -1
MAX_PROCESSES_LISTED = 64
# Meta's names of the two tables of the vocabulary, which may be one.
EMBEDDING_NAME, OUTPUT_NAME = "tok_embeddings.weight", "output.weight"
IGNORED_NAMES = frozenset({"rope.freqs"})  # rotary frequencies, in some of Meta's files; ModelArgs determines them
# Meta's params.json has only `use_scaled_rope`. The factor is 32 for the 1B and 3B of Llama 3.2, recognised by their
# width, and 8 otherwise.
ROPE_SCALING_FACTOR = 8.0
ROPE_SCALING_FACTORS_BY_DIM = {2048: 32.0, 3072: 32.0}
# The fields that each rope_type reads, besides rope_theta.
ROPE_FIELDS = {
    "default": (),
    "linear": ("rope_scaling_factor",),
    "llama3": (
        "rope_scaling_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_max_seq_len",
    ),
    "yarn": (
        "rope_scaling_factor",
        "rope_original_max_seq_len",
        "rope_attention_factor",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_truncate",
    ),
    "factors": ("rope_factors", "rope_attention_factor"),
}
MAX_ROPE_FACTOR = 1e30  # and its reciprocal the least: angles stay finite in float32


@dataclass
class ModelArgs:
    """The shape of a model, as in Meta's params.json, and the rows and positions of its cache.

    Fields that are left out or None are computed at construction; only `vocab_size` may stay unknown. Raises ValueError
    for values that no model can have.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = UNSET  # n_heads
    vocab_size: int = UNKNOWN_VOCAB_SIZE
    multiple_of: int = 256  # the ffn width is rounded up to a multiple of this
    ffn_dim_multiplier: float = UNSET  # 1
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_batch_size: int = 32
    max_seq_len: int = 2048
    use_scaled_rope: bool = False  # Llama 3.1 and later: rope_type "llama3"
    rope_scaling_factor: float = UNSET  # required by linear and yarn; else 32 for the widths of 3.2-1B and 3.2-3B, or 8
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    head_dim: int = UNSET  # dim / n_heads
    hidden_dim: int = UNSET  # the ffn width, from dim, ffn_dim_multiplier and multiple_of
    tied_output: bool = False  # the output projection is the embedding
    rope_type: str = UNSET  # a key of ROPE_FIELDS; "llama3" if use_scaled_rope, else "default"
    rope_attention_factor: float = UNSET  # of yarn and factors, on cos and sin; yarn's from rope_scaling_factor, or 1
    rope_beta_fast: float = 32.0  # yarn: pairs with more turns in the original context keep their frequency
    rope_beta_slow: float = 1.0  # yarn: pairs with fewer turns have theirs divided by the factor
    rope_truncate: bool = True  # yarn: the two bounds are rounded to whole pairs
    rope_factors: tuple[float, ...] = UNSET  # factors: what each of the head_dim/2 frequencies is divided by
    attention_bias: bool = False  # wq, wk, wv and wo add a bias
    mlp_bias: bool = False  # w1, w2 and w3 add a bias
    cache_tokens: int | None = None  # positions of all rows together; None: max_seq_len for each row

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "multiple_of", "max_batch_size", "max_seq_len"):
            self._check_positive_integer(name)
        self._check_positive_integer("rope_original_max_seq_len")
        if self.cache_tokens is not None:
            self._check_positive_integer("cache_tokens")
        if self.vocab_size != UNKNOWN_VOCAB_SIZE:
            self._check_positive_integer("vocab_size")
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.ffn_dim_multiplier is None:
            self.ffn_dim_multiplier = 1.0
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_low_freq_factor", "rope_high_freq_factor"):
            self._check_positive_number(name)
        for name in ("attention_bias", "mlp_bias", "rope_truncate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        self._derive_widths()
        self._derive_rope()

    def _derive_rope(self) -> None:
        if self.rope_type is None:
            self.rope_type = "llama3" if self.use_scaled_rope else "default"
        if not isinstance(self.rope_type, str) or self.rope_type not in ROPE_FIELDS:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_FIELDS)}, got {self.rope_type!r}")
        if (self.rope_type == "llama3") != bool(self.use_scaled_rope):
            raise ValueError(
                "use_scaled_rope must be true for rope_type 'llama3' and false for others, "
                f"got {self.use_scaled_rope!r} and {self.rope_type!r}"
            )
        if self.rope_scaling_factor is None and self.rope_type not in ("linear", "yarn"):
            self.rope_scaling_factor = ROPE_SCALING_FACTORS_BY_DIM.get(self.dim, ROPE_SCALING_FACTOR)
        self._check_positive_number("rope_scaling_factor")
        if self.rope_attention_factor is None:
            yarn = self.rope_type == "yarn"
            self.rope_attention_factor = yarn_attention_factor(self.rope_scaling_factor) if yarn else 1.0
        for name in ("rope_attention_factor", "rope_beta_fast", "rope_beta_slow"):
            self._check_positive_number(name)
        self._check_rope_factors()
        self._check_rope_order()

    def _check_rope_factors(self) -> None:
        values = self.rope_factors
        if values is None and self.rope_type != "factors":
            return
        if not isinstance(values, list | tuple) or len(values) != self.head_dim // 2:
            got = f"{len(values)} of them" if isinstance(values, list | tuple) else f"{values!r:.80}"
            raise ValueError(f"rope_factors must be {self.head_dim // 2} numbers, one for each frequency, got {got}")
        for value in values:
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 1 / MAX_ROPE_FACTOR <= value <= MAX_ROPE_FACTOR:
                raise ValueError(f"rope_factors must be positive numbers up to {MAX_ROPE_FACTOR:g}, got {value!r:.80}")
        self.rope_factors = tuple(map(float, values))

    def _check_rope_order(self) -> None:
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                "rope_high_freq_factor must be above rope_low_freq_factor, "
                f"got {self.rope_high_freq_factor} and {self.rope_low_freq_factor}"
            )
        if self.rope_beta_fast < self.rope_beta_slow:
            raise ValueError(
                f"rope_beta_fast must be at least rope_beta_slow, got {self.rope_beta_fast} and {self.rope_beta_slow}"
            )
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for rope_type 'yarn', got {self.rope_theta}")

    def _derive_widths(self) -> None:
        self._check_positive_integer("n_kv_heads")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim must be a multiple of n_heads, got {self.dim} and {self.n_heads}")
            self.head_dim = self.dim // self.n_heads
        self._check_positive_integer("head_dim")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {self.head_dim}")
        if self.hidden_dim is None:
            self.hidden_dim = ffn_width(self.dim, self.ffn_dim_multiplier, self.multiple_of)
        self._check_positive_integer("hidden_dim")

    def _check_positive_integer(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        setattr(self, name, int(value))

    def _check_positive_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        setattr(self, name, float(value))

    def split(self, size: int) -> "ModelArgs":
        """The arguments of each process's part of the model: heads, ffn width and vocabulary are divided by `size`.

        With more processes than kv heads, each process has one kv head, and several processes have the same one. Raises
        ValueError, which names the possible sizes, if the model cannot be divided.
        """
        if size == 1:
            return self
        obstacles = self.obstacles(size)
        if obstacles:
            possible = [n for n in range(1, MAX_PROCESSES_LISTED + 1) if not self.obstacles(n)]
            raise ValueError(
                f"this model cannot be split over world_size={size} processes: {'; '.join(obstacles)}; "
                f"use one of {', '.join(map(str, possible))} processes"
            )
        return replace(
            self,
            n_heads=self.n_heads // size,
            n_kv_heads=max(1, self.n_kv_heads // size),
            hidden_dim=self.hidden_dim // size,
            vocab_size=self.vocab_size // size,
        )

    def obstacles(self, size: int) -> list[str]:
        """The reasons why `size` processes cannot share the model; empty if they can."""
        reasons = [
            f"{name}={getattr(self, name)} does not divide by {size}"
            for name in ("n_heads", "hidden_dim", "vocab_size")
            if getattr(self, name) % size
        ]
        if self.n_kv_heads % size and size % self.n_kv_heads:
            reasons.append(f"n_kv_heads={self.n_kv_heads} is neither a multiple nor a divisor of {size}")
        return reasons

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by Meta's name, in the order of a forward pass."""
        layer_shapes = self._layer_shapes()
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING_NAME: (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes.update({f"layers.{layer}.{name}": shape for name, shape in layer_shapes.items()})
        return shapes | {"norm.weight": (self.dim,), OUTPUT_NAME: (self.vocab_size, self.dim)}

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        qkv = {"attention.wq": query, "attention.wk": key, "attention.wv": key}
        gate_up = {"feed_forward.w1": self.hidden_dim, "feed_forward.w3": self.hidden_dim}
        return {
            "attention_norm.weight": (self.dim,),
            **_shapes_of(qkv, self.dim, self.attention_bias),
            **_shapes_of({"attention.wo": self.dim}, query, self.attention_bias),
            "ffn_norm.weight": (self.dim,),
            **_shapes_of(gate_up, self.dim, self.mlp_bias),
            **_shapes_of({"feed_forward.w2": self.dim}, self.hidden_dim, self.mlp_bias),
        }


def _shapes_of(rows: Mapping[str, int], columns: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of projections that multiply the same input, given their rows: the weights, then the biases."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (n, columns) for name, n in rows.items()}
    return {**shapes, **{f"{name}.bias": (n,) for name, n in rows.items() if has_bias}}


def yarn_attention_factor(scaling_factor: float, scale: float = 1.0) -> float:
    """YaRN's rule for the factor on cos and sin: 1 + scale · ln(scaling_factor) / 10, and 1 if nothing is stretched."""
    return 1.0 + 0.1 * scale * math.log(max(scaling_factor, 1.0))


def ffn_width(dim: int, multiplier: float, multiple_of: int) -> int:
    """Meta's rule for the width of the feed-forward layer: two thirds of 4·dim, times the multiplier, rounded up."""
    return math.ceil(int(multiplier * int(8 * dim / 3)) / multiple_of) * multiple_of
