"""Every op of a forward pass at a model's sizes: random inputs, the call of a backend, and the library's equivalent.

An op of a decode step has the name of its launch ("qkv", "attention" and so on, as in `fastllama.speed_of_light`). The
name of a prefill's op begins with "prefill". The library is torch: cuBLAS or oneDNN through `F.linear`, `F.rms_norm`,
scaled_dot_product_attention with grouped queries, and top-p by sorting. It cannot read pages: its attention reads a
dense copy of the cache, and its append gets the tokens' places in the pages. Both are made before the call.
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
from fastllama.benchmarks.models import ModelSpec
from fastllama.kernels.batch import RaggedBatch, SamplingTensors
from fastllama.kernels.paged_cache import PAGE_TOKENS, LayerCache, pages_for
from fastllama.rope import rope_table
from fastllama.speed_of_light import Work, decode_step, prefill

TEMPERATURE, TOP_P = 0.6, 0.9
LOGITS_STD = 3.0  # gives a nucleus of some hundred tokens, more than a trained model's
SEED = 11
PREFILL = "prefill "  # the prefix of a prefill's ops

Output = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """The tensors that ops read, row-major. No op uses all of them."""

    batch: RaggedBatch
    x: Tensor  # (N, the op's input width); for sampling logits (B, V)
    weight: Tensor
    norm: Tensor
    residual: Tensor
    rope: Tensor
    cache: LayerCache
    places: tuple[Tensor, Tensor]  # the tokens' pages and places in them, which the library does not look up
    dense: tuple[Tensor, Tensor]  # a copy of the rows' keys and values (B, K, T, D), for the library's attention
    sampling: SamplingTensors
    eps: float

    @property
    def n_bytes(self) -> int:
        """The bytes that calls may read. The dense copy does not count: who reads it does not read the cache."""
        tensors = (getattr(self, one.name) for one in fields(self))
        return sum(tensor.nbytes for tensor in (*tensors, *self.cache) if isinstance(tensor, Tensor))

    @property
    def appended(self) -> tuple[Tensor, Tensor]:
        """The keys and values (N, K, D) at the batch's places in the cache."""
        pages, places = self.places
        return self.cache.k[pages, :, places], self.cache.v[pages, :, places]


class OpSpec(NamedTuple):
    """One op: its tolerance, its call of a backend, and the library's equivalent."""

    tolerance: str  # the name in TOLERANCES
    call: Callable[[Any, Inputs], Output]
    library: Callable[[Inputs], Output]
    packed: bool = True  # whether the weight is packed by `ops.pack`


@dataclass(frozen=True)
class Op:
    """An op at one size. `inputs(copy)` makes different tensors for each copy, and the same ones on each call."""

    name: str
    work: Work
    inputs: Callable[[int], Inputs]
    spec: OpSpec = field(repr=False)

    @property
    def independent_of_context(self) -> bool:
        """Whether the op is the same for any number of cached positions."""
        return self.name in ONCE_PER_BATCH

    @property
    def samples(self) -> bool:
        return self.spec.tolerance == "sample"

    @property
    def appends(self) -> bool:
        return self.name.endswith("qkv")

    def for_backend(self, ops: Any, inputs: Inputs, args: ModelArgs) -> Inputs:
        """The inputs as a backend gets them in a step: with its workspace and its layout of the weight."""
        workspace = ops.workspace(
            max_batch_size=len(inputs.batch.segments),
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            head_dim=args.head_dim,
            vocab_size=args.vocab_size,
            device=inputs.x.device,
        )
        weight = ops.pack(inputs.weight) if self.spec.packed else inputs.weight
        return replace(inputs, batch=replace(inputs.batch, workspace=workspace), weight=weight)

    def clear_appended(self, inputs: Inputs) -> None:
        """Overwrite the cache with NaN where a call appends, so that a missing append is noticed."""
        if self.appends:
            pages, places = inputs.places
            for memory in (inputs.cache.k, inputs.cache.v):
                memory[pages, :, places] = torch.nan

    def results(self, inputs: Inputs, output: Output) -> tuple[Tensor, ...]:
        """What a call returned, and what it appended to the cache."""
        found = output if isinstance(output, tuple) else (output,)
        return (*found, *inputs.appended) if self.appends else found


def _library_linear(i: Inputs) -> Tensor:
    normed: Tensor = F.rms_norm(i.x, [i.norm.shape[0]], i.norm, i.eps)
    return F.linear(normed, i.weight)


def _library_qkv(i: Inputs) -> Tensor:
    n_kv_heads, head_dim = i.cache.k.shape[1], i.cache.k.shape[3]
    heads = _library_linear(i).unflatten(-1, (-1, head_dim))
    pairs = torch.view_as_complex(heads[:, :-n_kv_heads].float().unflatten(-1, (-1, 2)))
    rotated_pairs = torch.view_as_real(pairs * torch.view_as_complex(i.rope[i.batch.positions])[:, None]).flatten(-2)
    rotated = rotated_pairs.to(heads.dtype)
    pages, places = i.places
    i.cache.k[pages, :, places] = rotated[:, -n_kv_heads:]
    i.cache.v[pages, :, places] = heads[:, -n_kv_heads:]
    return rotated[:, :-n_kv_heads]


def _library_attention(i: Inputs) -> Tensor:
    rows = len(i.batch.segments)
    q = i.x.unflatten(0, (rows, -1)).transpose(1, 2)  # (B, H, S, D): all rows have S tokens
    out = F.scaled_dot_product_attention(q, *i.dense, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def _library_swiglu(i: Inputs) -> Tensor:
    gate, up = _library_linear(i).chunk(2, -1)
    return F.silu(gate) * up


def _library_greedy(i: Inputs) -> tuple[Tensor, Tensor]:
    return _with_logprobs(i, i.x.argmax(-1))


def _library_top_p(i: Inputs) -> tuple[Tensor, Tensor]:
    ordered, ids = torch.softmax(i.x.float() / TEMPERATURE, -1).sort(stable=True, dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > TOP_P] = 0.0
    return _with_logprobs(i, ids.gather(-1, torch.multinomial(ordered, 1))[:, 0])


def _with_logprobs(i: Inputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, torch.log_softmax(i.x.float(), -1).gather(-1, tokens[:, None])[:, 0]


def _sample(ops: Any, i: Inputs) -> Any:
    return ops.sample(i.x, i.sampling, i.batch.positions, i.batch.workspace)


_LINEAR_RESIDUAL = OpSpec(
    "linear",
    lambda ops, i: ops.linear_residual(i.x, i.weight, i.residual, i.batch),
    lambda i: i.residual + F.linear(i.x, i.weight),
)
SPECS = {
    "embed": OpSpec(
        "linear",
        lambda ops, i: ops.embed(i.weight, i.batch),
        lambda i: F.embedding(i.batch.tokens, i.weight),
        packed=False,
    ),
    "qkv": OpSpec(
        "linear",
        lambda ops, i: ops.norm_qkv_rope_append(i.x, i.norm, i.weight, i.rope, i.cache, i.eps, i.batch),
        _library_qkv,
    ),
    "attention": OpSpec(
        "attention",
        lambda ops, i: ops.attention(i.x, i.cache, i.batch),
        _library_attention,
        packed=False,
    ),
    "output": _LINEAR_RESIDUAL,
    "gate+up": OpSpec("linear", lambda ops, i: ops.norm_swiglu(i.x, i.norm, i.weight, i.eps, i.batch), _library_swiglu),
    "down": _LINEAR_RESIDUAL,
    "head": OpSpec("linear", lambda ops, i: ops.norm_lm_head(i.x, i.norm, i.weight, i.eps, i.batch), _library_linear),
    "greedy": OpSpec("sample", _sample, _library_greedy, packed=False),
    "top-p": OpSpec("sample", _sample, _library_top_p, packed=False),
}
ONCE_PER_BATCH = [name for name in SPECS if name != "attention"]  # in a decode step, the same for every context
IN_PREFILL = ("qkv", "attention", "output", "gate+up", "down")


def ops_of(model: ModelSpec, batch: int, context: int, every: bool = True) -> Iterator[Op]:
    """The ops of a decode step of `batch` rows over `context` positions, and of the prefill of these positions.

    Without `every`, only the ops that depend on the context.
    """
    step = {work.name: work for work in decode_step(model.args, model.dtype, batch, context)}
    prompts = {work.name: work for work in prefill(model.args, model.dtype, [context] * batch)}
    for name, spec in SPECS.items():
        if every or name not in ONCE_PER_BATCH:
            work = Work(name, 1, 0, 0) if spec.tolerance == "sample" else step[name]
            yield Op(name, work, _input_maker(name, model, batch, context, 1), spec)
    for name in IN_PREFILL:
        inputs = _input_maker(name, model, batch, context, context)
        yield Op(PREFILL + name, prompts[name], inputs, SPECS[name])


def _input_maker(name: str, model: ModelSpec, batch: int, context: int, length: int) -> Callable[[int], Inputs]:
    """A function that makes an op's inputs for `batch` rows: the last `length` of `context` positions."""
    args, device = model.args, model.device
    n_kv_heads, head_dim, hidden_dim = args.n_kv_heads, args.head_dim, args.hidden_dim
    heads, qkv_rows = args.n_heads * head_dim, (args.n_heads + 2 * n_kv_heads) * head_dim
    # (shape of x without its tokens, shape of the weight)
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
    rope = rope_table(args, pages_for(context) * PAGE_TOKENS).to(device)

    def make(copy: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(SEED + copy)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(model.dtype)

        ids = torch.randint(args.vocab_size, (batch, length), generator=generator, device=device).tolist()
        pieces = [(row, context - length, tokens) for row, tokens in enumerate(ids)]
        ragged = RaggedBatch.of(pieces, device)
        in_cache = (context, n_kv_heads, head_dim) if name in ("qkv", "attention") else (1, 1, 1)
        cache = _shuffled_cache(batch, *in_cache, random)
        dense_k, dense_v = cache.rows(0, batch, context if name == "attention" else 1)
        return Inputs(
            batch=ragged,
            x=random(batch * length, *x_shape, scale=LOGITS_STD if name in ("greedy", "top-p") else 1.0),
            weight=random(*weight_shape, scale=1 / math.sqrt(weight_shape[1])),
            norm=1 + random(args.dim, scale=0.1),
            residual=random(batch * length, args.dim),
            rope=rope,
            cache=cache,
            places=cache.places(ragged.rows, ragged.positions),
            dense=(dense_k.contiguous(), dense_v.contiguous()),
            sampling=SamplingTensors.of(
                0.0 if name == "greedy" else TEMPERATURE, TOP_P, [(1, row, copy) for row in range(batch)], device
            ),
            eps=args.norm_eps,
        )

    return make


def _shuffled_cache(
    n_rows: int, length: int, n_kv_heads: int, head_dim: int, random: Callable[..., Tensor]
) -> LayerCache:
    """Random keys and values. The rows' pages are in random order, as after many calls."""
    n_pages = n_rows * pages_for(length)
    k, v = (random(n_pages + 1, n_kv_heads, PAGE_TOKENS, head_dim) for _ in range(2))
    order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(SEED))
    return LayerCache(k, v, order.view(n_rows, -1).to(k.device, torch.int32))


def compiled(ops: Any) -> SimpleNamespace:
    """A backend's ops with torch.compile, each compiled for the shapes of its first call."""
    torch.compiler.reset()  # otherwise the ninth shape of an op would run uncompiled
    names = ("embed", "norm_qkv_rope_append", "attention", "linear_residual", "norm_swiglu", "norm_lm_head", "sample")
    return SimpleNamespace(**{name: torch.compile(getattr(ops, name), fullgraph=True) for name in names})
