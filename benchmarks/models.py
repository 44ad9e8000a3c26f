"""The models that benchmarks run on, described so that another process can build exactly the same weights.

A `ModelSource` is a checkpoint folder, or a shape with a seed. A peer's process makes the same random weights from the
seed, so no weights are copied or written to disk.
"""

import base64
import itertools
import string
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import fastllama
from fastllama.args import ModelArgs
from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.base import dtype_name
from fastllama.checkpoint.sharding import ShardedTensor, read_slice, weight_specs
from fastllama.distributed.model_parallel import SINGLE_PROCESS, Group, model_group
from fastllama.generation import Llama
from fastllama.kernels import select
from fastllama.kernels.quantized import Weight
from fastllama.loading import choose_device
from fastllama.model import Transformer
from fastllama.quantization import Scheme, model_schemes
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_files import NUM_SPECIAL_TOKENS
from fastllama.tokenizer_open import open_tokenizer

RANDOM_SEED = 20240418
RANDOM_STD = 0.02
BYTES = 256
LEAST_VOCABULARY = BYTES + NUM_SPECIAL_TOKENS  # tokens of a random model's tokenizer
SEEDS_PER_MODEL = 1_000_003  # more than a model has tensors: two models' tensors never share a seed
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    # To check that everything runs.
    "random-toy": {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32},
    # About 176 million parameters: small enough for a CPU, and far larger than its caches in float32.
    "random-176m": {
        "dim": 1024,
        "n_layers": 8,
        "n_heads": 16,
        "n_kv_heads": 4,
        "vocab_size": 32768,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.3,
    },
    # The shape of SmolLM-135M: many small layers.
    "random-135m": {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": 49152,
        "multiple_of": 256,
        "tied_output": True,
    },
}


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_multiplier: float, multiple_of: int, **fields: Any
) -> dict[str, Any]:
    """The params.json of a published model."""
    widths = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8, "vocab_size": 128256}
    return {
        **widths,
        "ffn_dim_multiplier": ffn_multiplier,
        "multiple_of": multiple_of,
        "rope_theta": 500000.0,
        **fields,
    }


_LLAMA_3_2 = {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "tied_output": True}
# The shapes of published models. The weights are random, made on the device.
PUBLISHED_MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama3(4096, 32, 32, 1.3, 1024),
    "llama3-70b": _llama3(8192, 80, 64, 1.3, 4096),
    "llama3.1-8b": _llama3(4096, 32, 32, 1.3, 1024, use_scaled_rope=True),
    "llama3.2-1b": _llama3(2048, 16, 32, 1.5, 256, **_LLAMA_3_2),
    "llama3.2-3b": _llama3(3072, 28, 24, 1.0, 256, **_LLAMA_3_2),
}
MODEL_NAMES = ("builtin", *RANDOM_MODELS, *PUBLISHED_MODELS)


@dataclass(frozen=True)
class ModelSource:
    """A model's weights: either `ckpt_dir`, or `shape` (fields of ModelArgs) and `seed`. All values fit in JSON."""

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
        """The model `name`, one of MODEL_NAMES. ValueError for another name."""
        if name == "builtin":
            ckpt_dir, tokenizer_path = fastllama.builtin_checkpoint()
            return cls(name, ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path)
        shapes = RANDOM_MODELS | PUBLISHED_MODELS
        if name in shapes:
            return cls(name, shape=shapes[name])
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}")

    @classmethod
    def folder(cls, ckpt_dir: str, tokenizer_path: str | None) -> "ModelSource":
        """The model of a checkpoint folder, which also holds the tokenizer unless `tokenizer_path` is given."""
        return cls(Path(ckpt_dir).resolve().name, ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path or ckpt_dir)

    def args(self, max_batch_size: int, max_seq_len: int) -> ModelArgs:
        """The model's ModelArgs with these sizes of the cache."""
        fields = self.shape if self.ckpt_dir is None else open_checkpoint(self.ckpt_dir).params
        return ModelArgs(**{**fields, "max_batch_size": max_batch_size, "max_seq_len": max_seq_len})


@dataclass(frozen=True)
class ModelSpec:
    """A model as a benchmark builds it. `to_json` and `from_json` pass it to other processes."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    max_batch_size: int
    max_seq_len: int
    backend: str | None = None
    quantize: str | None = None  # of ours, and of a peer that has such weights

    @classmethod
    def from_json(cls, source: dict[str, Any], device: str, dtype: str, **fields: Any) -> "ModelSpec":
        """The spec whose `to_json` is given. The device "cuda" becomes this process's GPU."""
        return cls(ModelSource(**source), choose_device(device), getattr(torch, dtype), **fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"device": str(self.device), "dtype": dtype_name(self.dtype)}

    @property
    def backend_name(self) -> str:
        """The backend that runs. ValueError for one that cannot run here."""
        return select.backend(self.backend, self.device).__name__.rpartition(".")[2]

    @cached_property
    def args(self) -> ModelArgs:
        return self.source.args(self.max_batch_size, self.max_seq_len)

    def tensors(self, group: Group = SINGLE_PROCESS) -> Iterator[tuple[str, torch.Tensor]]:
        """(Meta's name, tensor) of every weight; with a group, this process's part of each."""
        if self.source.ckpt_dir is None:
            yield from random_tensors(self.args, self.source.seed, self.device, self.dtype, group)
            return
        for name, tensor in open_checkpoint(self.source.ckpt_dir).dense_tensors(group.rank, group.size, progress=False):
            yield name, tensor.to(device=self.device, dtype=self.dtype)

    def _weights(self, group: Group) -> Iterator[tuple[str, Weight]]:
        """The weights of `tensors` as they are in the files: quantised ones stay so."""
        if self.source.ckpt_dir is None:
            return self.tensors(group)
        return open_checkpoint(self.source.ckpt_dir).tensors(group.rank, group.size, progress=False)

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """How the weights of the complete model are quantised, by name."""
        stored = {} if self.source.ckpt_dir is None else open_checkpoint(self.source.ckpt_dir).schemes()
        return model_schemes(self.quantize, self.args, stored)

    def build(self) -> Llama:
        """Build the model as a Llama. If several processes share it, with this process's part of the weights."""
        args, group = self.args, model_group(None, self.device)
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "backend": self.backend}
        options["quantize"] = self.quantize
        with group.propagate_errors():
            model = Transformer(args, init_weights=False, group=group, **options)
            model.load_tensors(self._weights(group))
            return Llama(model, _tokenizer(self.source, args.vocab_size))


def build_from_json(**spec: Any) -> Llama:
    """Build the ModelSpec whose `to_json` is given."""
    return ModelSpec.from_json(**spec).build()


def _tokenizer(source: ModelSource, vocab_size: int) -> BaseTokenizer:
    if source.tokenizer_path is not None:
        tokenizer = open_tokenizer(source.tokenizer_path)
        tokenizer.n_rows = vocab_size  # more than it has tokens, where a vocabulary is padded
        return tokenizer
    return random_tokenizer(vocab_size)


def random_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for random weights, of bytes and words of letters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(_ranks(vocab_size - NUM_SPECIAL_TOKENS))
        return Tokenizer(path)


def _ranks(count: int) -> bytes:
    """A ranks file of `count` tokens for random weights: every byte, then words of letters."""
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


def random_tensors(
    args: ModelArgs, seed: int, device: torch.device, dtype: torch.dtype, group: Group = SINGLE_PROCESS
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight, normal with RANDOM_STD; norms are around one. With a group, this process's part.

    The same seed on the same kind of device gives the same weights. A tied weight is yielded twice, as in Meta's files.
    """
    generator = torch.Generator(device)
    names = list(args.shapes)
    for weight in weight_specs(vars(args)):
        drawn = "tok_embeddings.weight" if args.tied_output and weight.name == "output.weight" else weight.name
        generator.manual_seed(seed * SEEDS_PER_MODEL + names.index(drawn))
        tensor = torch.randn(weight.shape, generator=generator, device=device) * RANDOM_STD
        tensor = (tensor + 1 if weight.name.endswith("norm.weight") else tensor).to(dtype)
        yield weight.name, read_slice(ShardedTensor((tensor,)), weight, group.rank, group.size)
