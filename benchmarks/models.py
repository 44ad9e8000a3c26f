"""Which weights a benchmark runs on, told so that another process can get exactly the same ones.

A `ModelSource` is a few strings and numbers: a checkpoint folder, or a shape with a seed. A peer in its own process
rebuilds the same weights from it, because a seeded generator repeats itself; nothing large is copied or written to
disk.
"""

import base64
import itertools
import string
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastllama
from fastllama.args import ModelArgs
from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.sharding import ShardedTensor, read_slice, weight_specs
from fastllama.distributed.parallel import SINGLE_PROCESS, Group, model_group
from fastllama.generation import Llama
from fastllama.loading import choose_device
from fastllama.model import Transformer
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_files import NUM_SPECIAL_TOKENS

RANDOM_SEED = 20240418
RANDOM_STD = 0.02
BYTES = 256
SEEDS_PER_MODEL = 1_000_003  # tensors of one model never share a seed with those of the next model seed
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    # To see that everything runs.
    "random-toy": {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32},
    # About 176 million parameters: small enough for a CPU, and at float32 far beyond its caches.
    "random-176m": {
        "dim": 1024,
        "n_layers": 8,
        "n_heads": 16,
        "n_kv_heads": 4,
        "vocab_size": 32768,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.3,
    },
}
_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0}
_SCALED = {**_LLAMA_3, "use_scaled_rope": True}
# The published models' shapes, as their params.json have them. Their weights here are random, made on the device.
PUBLISHED_MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA_3
    | {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "llama3-70b": _LLAMA_3
    | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
    "llama3.1-8b": _SCALED
    | {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "llama3.2-1b": _SCALED
    | {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256}
    | {"rope_scaling_factor": 32.0, "tied_output": True},
    "llama3.2-3b": _SCALED
    | {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "multiple_of": 256}
    | {"rope_scaling_factor": 32.0, "tied_output": True},
}
MODEL_NAMES = ("builtin", *RANDOM_MODELS, *PUBLISHED_MODELS)


@dataclass(frozen=True)
class ModelSource:
    """Weights by reference: `ckpt_dir` or `shape` (ModelArgs fields), one of the two; every field survives JSON."""

    name: str
    ckpt_dir: str | None = None
    tokenizer_path: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    seed: int = RANDOM_SEED

    def __post_init__(self) -> None:
        if (self.ckpt_dir is None) == (not self.shape):
            raise ValueError(
                f"a model comes from a checkpoint folder or from a shape, got {self.ckpt_dir!r} and {self.shape!r}"
            )

    @classmethod
    def named(cls, name: str) -> "ModelSource":
        """The model called `name`, one of MODEL_NAMES. ValueError for another name."""
        if name == "builtin":
            ckpt_dir, tokenizer_path = fastllama.builtin_checkpoint()
            return cls(name, ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path)
        shapes = RANDOM_MODELS | PUBLISHED_MODELS
        if name in shapes:
            return cls(name, shape=shapes[name])
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}")

    @classmethod
    def folder(cls, ckpt_dir: str, tokenizer_path: str | None) -> "ModelSource":
        """The model of a checkpoint folder; its tokenizer lies there too unless it is named."""
        return cls(Path(ckpt_dir).resolve().name, ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path or ckpt_dir)

    def args(self, max_batch_size: int, max_seq_len: int) -> ModelArgs:
        """The model's dimensions with these sizes of the cache."""
        fields = self.shape if self.ckpt_dir is None else open_checkpoint(self.ckpt_dir).params
        return ModelArgs(**{**fields, "max_batch_size": max_batch_size, "max_seq_len": max_seq_len})

    def tensors(
        self, args: ModelArgs, device: torch.device, dtype: torch.dtype, group: Group = SINGLE_PROCESS
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight, or this process's part of it, in Meta's names, on `device` in `dtype`."""
        if self.ckpt_dir is None:
            yield from random_tensors(args, self.seed, device, dtype, group)
            return
        for name, tensor in open_checkpoint(self.ckpt_dir).tensors(group.rank, group.size, progress=False):
            yield name, tensor.to(device=device, dtype=dtype)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build(source: ModelSource, args: ModelArgs, device: torch.device, dtype: torch.dtype, backend: str | None) -> Llama:
    """A Llama with the weights of `source`, or this process's part of it, where several share one."""
    group = model_group(None, device)
    with group.propagate_errors():
        model = Transformer(args, device=device, dtype=dtype, backend=backend, init_weights=False, group=group)
        model.load_tensors(source.tensors(args, device, dtype, group))
        return Llama(model, _tokenizer(source, args.vocab_size))


def described(
    source: dict[str, Any], max_batch_size: int, max_seq_len: int, device: str, dtype: str, backend: str | None
) -> Llama:
    """`build` for other processes: what it takes, as JSON can hold it."""
    model = ModelSource(**source)
    args = model.args(max_batch_size, max_seq_len)
    return build(model, args, choose_device(device), getattr(torch, dtype), backend)


def _tokenizer(source: ModelSource, vocab_size: int) -> Tokenizer:
    if source.tokenizer_path is not None:
        return Tokenizer(source.tokenizer_path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(_ranks(vocab_size - NUM_SPECIAL_TOKENS))
        return Tokenizer(path)


def _ranks(count: int) -> bytes:
    """A ranks file of `count` tokens, for weights that nobody trained: every byte, then words of letters."""
    if count < BYTES:
        raise ValueError(
            f"a vocabulary needs at least {BYTES + NUM_SPECIAL_TOKENS} tokens, got {count + NUM_SPECIAL_TOKENS}"
        )
    letters = [letter.encode() for letter in string.ascii_lowercase]
    words = (b"".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    tokens = itertools.chain((bytes([value]) for value in range(BYTES)), words)
    lines = (
        base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(itertools.islice(tokens, count))
    )
    return b"\n".join(lines)


def resolved(args: ModelArgs) -> tuple[int, int, int]:
    """(n_kv_heads, head_dim, hidden_dim), which ModelArgs has settled by the time it exists."""
    if args.n_kv_heads is None or args.head_dim is None or args.hidden_dim is None:
        raise ValueError(f"ModelArgs left a dimension open: {args}")
    return args.n_kv_heads, args.head_dim, args.hidden_dim


def random_tensors(
    args: ModelArgs, seed: int, device: torch.device, dtype: torch.dtype, group: Group = SINGLE_PROCESS
) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal weights of RANDOM_STD, norms around one: the same ones for the same seed and kind of device.

    A tied output comes twice, as in Meta's files. Of a model that is shared, the process's part.
    """
    generator = torch.Generator(device)
    names = list(args.shapes)
    for weight in weight_specs(vars(args)):
        drawn = "tok_embeddings.weight" if args.tied_output and weight.name == "output.weight" else weight.name
        generator.manual_seed(seed * SEEDS_PER_MODEL + names.index(drawn))
        tensor = torch.randn(weight.shape, generator=generator, device=device) * RANDOM_STD
        tensor = (tensor + 1 if len(weight.shape) == 1 else tensor).to(dtype)
        yield weight.name, read_slice(ShardedTensor((tensor,)), weight, group.rank, group.size)
