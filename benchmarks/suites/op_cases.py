"""Every op of a forward pass at a model's sizes: random inputs, the call of a backend, and the library's best.

An op is `qkv`, `attention` and so on of `fastllama.kernels.reference`, for a decode step's tokens or, where its name
begins with "prefill", for whole prompts. The library is torch's own: cuBLAS or oneDNN through `F.linear`,
`F.rms_norm`, scaled_dot_product_attention with grouped queries, and top-p by sorting.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import resolved
from fastllama.kernels.batch import RaggedBatch, SamplingTensors, Workspace
from fastllama.rope import rope_table
from fastllama.speed_of_light import Work, decode_step, prefill

TEMPERATURE, TOP_P = 0.6, 0.9
SPREAD = 3.0  # of random logits: a nucleus of some hundred tokens, more than a trained model's
SEED = 11
PREFILL = "prefill "  # begins the names of ops on whole prompts

Output = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What an op reads, in plain row-major tensors. An op has no use for some of them."""

    batch: RaggedBatch
    x: Tensor  # (N, ·) of the width that the op takes; logits (B, V) of sampling
    weight: Tensor
    norm: Tensor
    residual: Tensor
    rope: Tensor
    cache_k: Tensor
    cache_v: Tensor
    sampling: SamplingTensors
    eps: float

    @property
    def n_bytes(self) -> int:
        tensors = (getattr(self, one.name) for one in fields(self))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class _Kind(NamedTuple):
    """One op: how its result is compared, what it reads, how a backend is called and how the library does it."""

    tolerance: str  # its row of TOLERANCES
    call: Callable[[Any, Inputs], Output]
    library: Callable[[Inputs], Output]
    packed: bool = True  # whether its weight is what `ops.pack` makes


@dataclass(frozen=True)
class Op:
    """An op at one size. `inputs(copy)` makes other tensors for each copy, the same for the same copy."""

    name: str
    work: Work
    inputs: Callable[[int], Inputs]
    kind: _Kind = field(repr=False)

    @property
    def in_any_context(self) -> bool:
        """Whether a decode step's call is the same over any number of cached positions."""
        return self.name in ONCE_A_BATCH

    @property
    def samples(self) -> bool:
        return self.kind.tolerance == "sample"

    def suited(self, ops: Any, inputs: Inputs, scratch: Workspace) -> Inputs:
        """The inputs as a backend finds them in a step: with its scratch memory, and its own layout of the weight."""
        weight = ops.pack(inputs.weight) if self.kind.packed else inputs.weight
        return replace(inputs, batch=replace(inputs.batch, workspace=scratch), weight=weight)

    def forget(self, inputs: Inputs) -> None:
        """Take out of the cache what a call is to append, so that one which appends nothing shows."""
        if self.name.endswith("qkv"):
            for cache in (inputs.cache_k, inputs.cache_v):
                cache[inputs.batch.rows, :, inputs.batch.positions] = torch.nan

    def results(self, inputs: Inputs, output: Output) -> tuple[Tensor, ...]:
        """Everything that a call left: what it returned, and what it appended to the cache."""
        found = output if isinstance(output, tuple) else (output,)
        if not self.name.endswith("qkv"):
            return found
        rows, positions = inputs.batch.rows, inputs.batch.positions
        return *found, inputs.cache_k[rows, :, positions], inputs.cache_v[rows, :, positions]


def _library_embed(i: Inputs) -> Tensor:
    return F.embedding(i.batch.tokens, i.weight)


def _library_linear(i: Inputs) -> Tensor:
    normed: Tensor = F.rms_norm(i.x, [i.norm.shape[0]], i.norm, i.eps)
    return F.linear(normed, i.weight)


def _library_qkv(i: Inputs) -> Tensor:
    n_kv_heads, head_dim = i.cache_k.shape[1], i.cache_k.shape[3]
    heads = _library_linear(i).unflatten(-1, (-1, head_dim))
    pairs = torch.view_as_complex(heads[:, :-n_kv_heads].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.view_as_complex(i.rope[i.batch.positions])[:, None]).flatten(-2)
    rotated = turned.to(heads.dtype)
    i.cache_k[i.batch.rows, :, i.batch.positions] = rotated[:, -n_kv_heads:]
    i.cache_v[i.batch.rows, :, i.batch.positions] = heads[:, -n_kv_heads:]
    return rotated[:, :-n_kv_heads]


def _library_attention(i: Inputs) -> Tensor:
    rows = len(i.batch.segments)
    q = i.x.unflatten(0, (rows, -1)).transpose(1, 2)  # (B, H, S, D), of as many tokens in each row
    out = F.scaled_dot_product_attention(q, i.cache_k, i.cache_v, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def _library_project(i: Inputs) -> Tensor:
    return i.residual + F.linear(i.x, i.weight)


def _library_swiglu(i: Inputs) -> Tensor:
    gate, up = _library_linear(i).chunk(2, -1)
    return F.silu(gate) * up


def _library_greedy(i: Inputs) -> tuple[Tensor, Tensor]:
    tokens = i.x.argmax(-1)
    return tokens, torch.log_softmax(i.x.float(), -1).gather(-1, tokens[:, None])[:, 0]


def _library_top_p(i: Inputs) -> tuple[Tensor, Tensor]:
    ordered, ids = torch.softmax(i.x.float() / TEMPERATURE, -1).sort(stable=True, dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > TOP_P] = 0.0
    tokens = ids.gather(-1, torch.multinomial(ordered, 1))
    return tokens[:, 0], torch.log_softmax(i.x.float(), -1).gather(-1, tokens)[:, 0]


def _sample(ops: Any, i: Inputs) -> Output:
    found: Output = ops.sample(i.x, i.sampling, i.batch.positions, i.batch.workspace)
    return found


_PROJECT = _Kind("linear", lambda ops, i: ops.linear_residual(i.x, i.weight, i.residual, i.batch), _library_project)
_KINDS = {
    "embed": _Kind("linear", lambda ops, i: ops.embed(i.weight, i.batch), _library_embed, packed=False),
    "qkv": _Kind(
        "linear",
        lambda ops, i: ops.norm_qkv_rope_append(i.x, i.norm, i.weight, i.rope, i.cache_k, i.cache_v, i.eps, i.batch),
        _library_qkv,
    ),
    "attention": _Kind(
        "attention",
        lambda ops, i: ops.attention(i.x, i.cache_k, i.cache_v, i.batch),
        _library_attention,
        packed=False,
    ),
    "output": _PROJECT,
    "gate+up": _Kind("linear", lambda ops, i: ops.norm_swiglu(i.x, i.norm, i.weight, i.eps, i.batch), _library_swiglu),
    "down": _PROJECT,
    "head": _Kind("linear", lambda ops, i: ops.norm_lm_head(i.x, i.norm, i.weight, i.eps, i.batch), _library_linear),
    "greedy": _Kind("sample", _sample, _library_greedy, packed=False),
    "top-p": _Kind("sample", _sample, _library_top_p, packed=False),
}
ONCE_A_BATCH = [name for name in _KINDS if name != "attention"]  # whose decode step is the same in any context
IN_PREFILL = ("qkv", "attention", "output", "gate+up", "down")


def ops_of(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, batch: int, context: int, every: bool = True
) -> Iterator[Op]:
    """The ops of a decode step of `batch` rows over `context` positions, and of a prefill of such prompts.

    every: also those that no context changes.
    """
    step = {work.name: work for work in decode_step(args, dtype, batch, context)}
    prompts = {work.name: work for work in prefill(args, dtype, [context] * batch)}
    for name, kind in _KINDS.items():
        if every or name not in ONCE_A_BATCH:
            work = Work(name, 1, 0, 0) if kind.tolerance == "sample" else step[name]
            yield Op(name, work, _maker(name, args, device, dtype, batch, context, 1), kind)
    for name in IN_PREFILL:
        inputs = _maker(name, args, device, dtype, batch, context, context)
        yield Op(PREFILL + name, prompts[name], inputs, _KINDS[name])


def _maker(
    name: str, args: ModelArgs, device: torch.device, dtype: torch.dtype, batch: int, context: int, length: int
) -> Callable[[int], Inputs]:
    """Makes inputs of an op for the last `length` positions of `batch` rows that hold `context`."""
    n_kv_heads, head_dim, hidden_dim = resolved(args)
    heads, qkv_rows = args.n_heads * head_dim, (args.n_heads + 2 * n_kv_heads) * head_dim
    # (the shape of x behind its tokens, of the weight)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "embed": ((1,), (args.vocab_size, args.dim)),
        "qkv": ((args.dim,), (qkv_rows, args.dim)),
        "attention": ((args.n_heads, head_dim), (1, 1)),
        "output": ((heads,), (args.dim, heads)),
        "gate+up": ((args.dim,), (2 * hidden_dim, args.dim)),
        "down": ((hidden_dim,), (args.dim, hidden_dim)),
        "head": ((args.dim,), (args.vocab_size, args.dim)),
    }
    x_shape, weight_shape = shapes.get(name, ((args.vocab_size,), (1, 1)))
    rope = rope_table(replace(args, max_seq_len=context)).to(device)

    def make(copy: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(SEED + copy)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        ids = torch.randint(args.vocab_size, (batch, length), generator=generator, device=device).tolist()
        pieces = [(row, context - length, tokens) for row, tokens in enumerate(ids)]
        cache = (batch, n_kv_heads, context, head_dim) if name in ("qkv", "attention") else (1, 1, 1, 1)
        return Inputs(
            batch=RaggedBatch.of(pieces, device),
            x=random(batch * length, *x_shape, scale=SPREAD if name in ("greedy", "top-p") else 1.0),
            weight=random(*weight_shape, scale=1 / math.sqrt(weight_shape[1])),
            norm=1 + random(args.dim, scale=0.1),
            residual=random(batch * length, args.dim),
            rope=rope,
            cache_k=random(*cache),
            cache_v=random(*cache),
            sampling=SamplingTensors.of(
                0.0 if name == "greedy" else TEMPERATURE, TOP_P, [(1, row, copy) for row in range(batch)], device
            ),
            eps=args.norm_eps,
        )

    return make


def workspace(ops: Any, args: ModelArgs, batch: int, device: torch.device) -> Workspace:
    """A backend's scratch memory for one copy of inputs."""
    n_kv_heads, head_dim, _ = resolved(args)
    found: Workspace = ops.workspace(
        max_batch_size=batch,
        n_heads=args.n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=args.vocab_size,
        device=device,
    )
    return found


def compiled(ops: Any) -> SimpleNamespace:
    """A backend's ops behind torch.compile, each compiled for the shapes it meets first."""
    torch.compiler.reset()  # or the ninth shape of an op would run uncompiled
    names = ("embed", "norm_qkv_rope_append", "attention", "linear_residual", "norm_swiglu", "norm_lm_head", "sample")
    return SimpleNamespace(**{name: torch.compile(getattr(ops, name), fullgraph=True) for name in names})
