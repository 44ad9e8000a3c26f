"""The table of the rotary embedding's cosines and sines, for every rope_type of ModelArgs."""

import math

import torch
from torch import Tensor

from fastllama.args import ROPE_FIELDS, ModelArgs

EMPTY_RAMP_WIDTH = 0.001  # transformers' width of YaRN's ramp if both bounds are one pair


def rope_table(args: ModelArgs, length: int | None = None) -> Tensor:
    """cos and sin of every position's angles: (length, head_dim/2, 2) float32; length None means max_seq_len.

    With YaRN and with factors, both are multiplied by the attention factor. So the scores of attention grow by its
    square.
    """
    positions = torch.arange(length or args.max_seq_len, device="cpu").float()
    angles = torch.outer(positions, rope_frequencies(args))
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return table * args.rope_attention_factor if "rope_attention_factor" in ROPE_FIELDS[args.rope_type] else table


def check_angles(args: ModelArgs) -> None:
    """Raise ValueError if the fields give angles that are not finite: no real model has such."""
    if not bool((rope_frequencies(args) * (args.max_seq_len - 1)).isfinite().all()):
        fields = ", ".join(f"{name}={getattr(args, name)}" for name in ("rope_theta", *ROPE_FIELDS[args.rope_type]))
        raise ValueError(f"{fields} give angles that are not finite at position {args.max_seq_len - 1}: correct them")


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The angle per position of each pair: (head_dim/2,) float32.

    Scaling divides a frequency by the factor completely, in part or not at all, which depends on the pair.
    """
    head_dim = args.head_dim
    frequencies = 1.0 / (args.rope_theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))
    if args.rope_type == "default":
        return frequencies
    if args.rope_type == "linear":
        return frequencies / args.rope_scaling_factor
    if args.rope_type == "factors":
        return frequencies / torch.tensor(args.rope_factors, device="cpu", dtype=torch.float32)
    unscaled = _llama3_unscaled(args, frequencies) if args.rope_type == "llama3" else _yarn_unscaled(args)
    return frequencies * (unscaled + (1 - unscaled) / args.rope_scaling_factor)


def _llama3_unscaled(args: ModelArgs, frequencies: Tensor) -> Tensor:
    """The share of each frequency that Llama 3.1 does not scale: (head_dim/2,) from 0 to 1.

    It is 0 for wavelengths above the original context and 1 below a quarter of it. In between it is linear in the
    frequency.
    """
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    turns = args.rope_original_max_seq_len * frequencies / (2 * math.pi)  # per original context
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_unscaled(args: ModelArgs) -> Tensor:
    """The share of each frequency that YaRN does not scale: (head_dim/2,) from 0 to 1.

    It is 1 up to the pair that turns beta_fast times in the original context, and 0 from the pair that turns beta_slow
    times. In between it is linear in the pair's number.
    """
    first, last = _pair_that_turns(args, args.rope_beta_fast), _pair_that_turns(args, args.rope_beta_slow)
    if args.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers keeps the bounds in 0 ... head_dim - 1, though there are head_dim/2 pairs. They may even change
    # places: then all pairs are scaled, or none.
    first, last = float(max(first, 0)), float(min(last, args.head_dim - 1))
    width = last - first if last != first else EMPTY_RAMP_WIDTH
    pairs = torch.arange(args.head_dim // 2, device="cpu").float()
    return 1 - ((pairs - first) / width).clamp(0, 1)


def _pair_that_turns(args: ModelArgs, times: float) -> float:
    """The number of the pair, not an integer, that turns so many times in the original context."""
    # A difference of logarithms: the quotient of extreme numbers would overflow.
    wavelength = math.log(args.rope_original_max_seq_len / (2 * math.pi)) - math.log(times)
    return args.head_dim * wavelength / (2 * math.log(args.rope_theta))
