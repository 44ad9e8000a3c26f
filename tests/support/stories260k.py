"""Reads stories260K, a small trained Llama in llama2.c's format, from `../shared/data` beside the repository."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastllama import ModelArgs
from fastllama.tokenizer_base import BaseTokenizer

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K"
BOS_ID = 1
# llama2.c's output for 200 steps at temperature 0.
GREEDY_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
    "play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she"
)
GREEDY_STEPS = 200


def read_model(max_seq_len: int, max_batch_size: int) -> tuple[ModelArgs, dict[str, Tensor]]:
    """The model's arguments, and its float32 weights in Meta's names."""
    data = (FOLDER / "stories260K.bin").read_bytes()
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack("7i", data[:28])
    values = np.frombuffer(data, dtype=np.float32, offset=28)
    offset = 0

    def take(*shape: int) -> Tensor:
        nonlocal offset
        size = int(np.prod(shape))
        tensor = torch.from_numpy(values[offset : offset + size].copy()).view(shape)
        offset += size
        return tensor

    head_dim = dim // n_heads
    kv_dim = n_kv_heads * head_dim
    weights = {"tok_embeddings.weight": take(vocab_size, dim)}
    # The file holds all layers of a weight one after the other, in this order.
    layered = {
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden_dim, dim),
        "feed_forward.w2": (dim, hidden_dim),
        "feed_forward.w3": (hidden_dim, dim),
    }
    for name, shape in layered.items():
        for layer, weight in enumerate(take(n_layers, *shape)):
            weights[f"layers.{layer}.{name}.weight"] = weight
    weights["norm.weight"] = take(dim)
    args = ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        rope_theta=10000.0,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        tied_output=True,
    )
    assert offset + seq_len * head_dim == len(values), "the rest of the file is its rotary table"
    return args, weights


def read_pieces() -> list[bytes]:
    """The bytes of every token."""
    data = (FOLDER / "tok512.bin").read_bytes()
    offset, pieces = 4, []
    while offset < len(data):
        length = struct.unpack_from("i", data, offset + 4)[0]
        piece = data[offset + 8 : offset + 8 + length]
        pieces.append(bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") else piece)
        offset += 8 + length
    return pieces


class PiecesTokenizer(BaseTokenizer):
    """The tokens of tok512.bin. It decodes; the prompts of the tests are token ids."""

    def __init__(self) -> None:
        self.pieces = read_pieces()
        self.n_words = len(self.pieces)
        self.bos_id, self.eos_id, self.pad_id = BOS_ID, BOS_ID + 1, -1
        self.stop_tokens = set()
        self.special_tokens = {}

    def _encode_text(self, s: str, *, is_first: bool) -> list[int]:
        raise ValueError("tok512.bin is read to decode only: give token ids")

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces[token] for token in ids)
