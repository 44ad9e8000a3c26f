"""The table of the rotary embedding's cosines and sines, plain and scaled."""

import math

import torch
from torch import Tensor

from fastllama.args import ModelArgs


def rope_table(args: ModelArgs) -> Tensor:
    """cos and sin of every position's angles: (max_seq_len, head_dim/2, 2) float32."""
    angles = torch.outer(torch.arange(args.max_seq_len, device="cpu").float(), rope_frequencies(args))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The angle per position of each pair: (head_dim/2,) float32.

    With scaled rope (Llama 3.1), wavelengths above the original context are multiplied by the factor, those below a
    quarter of it are unscaled, and those in between are interpolated.
    """
    head_dim = args.head_dim
    frequencies = 1.0 / (args.rope_theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))
    if args.use_scaled_rope:
        low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
        turns = args.rope_original_max_seq_len * frequencies / (2 * math.pi)  # per original context
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (unscaled + (1 - unscaled) / args.rope_scaling_factor)
    return frequencies
