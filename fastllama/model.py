"""The Llama 3 Transformer: five calls to the backend per layer.

`Transformer` holds the packed weights, the rotary table and the key/value cache. It runs ragged batches: tokens of any
rows at any positions in one pass. `state_dict` and `load_state_dict` use Meta's names. `fastllama.kernels.reference`
defines what the five calls compute.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastllama import threads, validate
from fastllama.args import IGNORED_NAMES, ModelArgs
from fastllama.cache import KVCache
from fastllama.distributed.model_parallel import SINGLE_PROCESS, Group
from fastllama.kernels import select
from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.kernels.quantized import Weight
from fastllama.packed_weights import NO_WEIGHTS, LoadedKeys, PackedModule, check_state_dict
from fastllama.quantization import check_quantize
from fastllama.rope import rope_table
from fastllama.torch_settings import default_settings, with_default_settings

BUSY = "this model is busy with another call or an open stream: finish that one, or close it with .close()"


class Layer(nn.Module):
    """One layer's packed weights (`fastllama.packed_weights`)."""

    attention_norm: Tensor
    wqkv: Weight
    bqkv: Tensor | None
    wo: Weight
    bo: Tensor | None
    ffn_norm: Tensor
    w13: Weight
    b13: Tensor | None
    w2: Weight
    b2: Tensor | None


class Transformer(PackedModule):
    """A Llama model with its cache. `params` are its ModelArgs, `ops` its backend, `cache` its KVCache.

    If several processes share the model, `share` are the ModelArgs of this process's part: its heads with their
    cache, its ffn width, its rows of the embedding and of the output. All processes of the group make the same calls.
    """

    rope: Tensor

    def __init__(
        self,
        params: ModelArgs,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        quantize: str | None = None,
        init_weights: bool = True,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        """Allocate the cache and random weights; init_weights=False leaves the weights out, to be loaded by the caller.

        device and dtype default to torch's defaults, backend to the device's. quantize: the weights are quantised
        when they are loaded (`fastllama.quantization.CHOICES`). group: the processes that share the model. Raises
        ValueError for an unknown vocabulary size, backend or quantisation, and for sizes that do not divide by the
        group's size, or into int4's groups.
        """
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"the model needs to know its vocab_size, got {params.vocab_size}: set it in ModelArgs")
        # torch.get_default_device ignores torch.set_default_tensor_type, which Meta's scripts call.
        device = torch.tensor(()).device if device is None else device
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.quantize = quantize
        self._construct(params, device, backend, init_weights, group)

    @with_default_settings
    @torch.inference_mode(False)
    def _construct(
        self, params: ModelArgs, device: torch.device | str, backend: str | None, init_weights: bool, group: Group
    ) -> None:
        self.params, self.device = params, torch.device(device)
        self.group, self.share = group, params.split(group.size)
        self._n_weights = sum(math.prod(shape) for shape in self.share.shapes.values())
        self.vocab_size, self.n_layers = params.vocab_size, params.n_layers
        self.backend = backend
        self.ops = select.backend(backend, self.device, self.dtype)
        check_quantize(self.quantize, self.share, self.device)
        self._lock = threading.Lock()
        self._step_sizes = 1, params.max_batch_size  # the most tokens of a decode step: of a row, of all rows together
        self.revision = 0  # changes whenever weights, cache or workspace are replaced by other tensors
        self.layers = nn.ModuleList(Layer() for _ in range(params.n_layers))
        self._register_weights()
        if init_weights:
            self.load_tensors(self._random_weights())
        self._allocate()

    @with_default_settings
    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Meta's signature: tokens (B, S) of rows 0 to B - 1 at positions from start_pos -> float32 logits (B, S, V).

        Each row attends to its cached positions before start_pos. Raises ValueError for tokens that do not fit the
        cache, RuntimeError while a generation or an open stream uses the cache.
        """
        with self.exclusively():
            if self.output is None:
                raise ValueError(NO_WEIGHTS)
            sizes = self.cache.max_batch_size, self.cache.max_seq_len, self.vocab_size
            start, rows, length = validate.forward(tokens, start_pos, *sizes)
            self.cache.check_fits([start + length] * rows)
            self.cache.extend([start + length] * rows)
            with self.suited(rows * length, start + length):
                return self._forward(tokens, start, rows, length)

    def _forward(self, tokens: Tensor, start_pos: int, rows: int, length: int) -> Tensor:
        batch = RaggedBatch(
            tokens=tokens.to(self.device, torch.int64).flatten().contiguous(),
            positions=torch.arange(start_pos, start_pos + length, device=self.device).repeat(rows),
            rows=torch.arange(rows, device=self.device).repeat_interleave(length),
            segments=tuple(Segment(row, row * length, (row + 1) * length, start_pos + length) for row in range(rows)),
            workspace=self.workspace,
        )
        return self.logits(self.hidden(batch), batch).float().view(rows, length, self.vocab_size)

    def hidden(self, batch: RaggedBatch) -> Tensor:
        """Run all layers over a batch, appending its keys and values to the cache -> hidden states (N, dim)."""
        ops, eps, group = self.ops, self.params.norm_eps, self.group
        adds = group.rank == 0  # all processes have the residual and the output's bias, and a sum must hold them once
        h = self._embed(batch)
        for index, layer in enumerate(cast(Iterable[Layer], self.layers)):
            cache = self.cache.layer(index)
            q = ops.norm_qkv_rope_append(h, layer.attention_norm, layer.wqkv, self.rope, cache, eps, batch, layer.bqkv)
            attended = ops.attention(q, cache, batch)
            residual, bias = (h, layer.bo) if adds else (None, None)
            h = group.all_reduce(ops.linear_residual(attended, layer.wo, residual, batch, bias))
            f = ops.norm_swiglu(h, layer.ffn_norm, layer.w13, eps, batch, layer.b13)
            residual, bias = (h, layer.b2) if adds else (None, None)
            h = group.all_reduce(ops.linear_residual(f, layer.w2, residual, batch, bias))
        return h

    def _embed(self, batch: RaggedBatch) -> Tensor:
        """The tokens' embeddings (N, dim), each from the process that holds its row of the table."""
        begin = self.group.rank * self.share.vocab_size if self.group.size > 1 else None
        return self.group.all_reduce(self.ops.embed(self.tok_embeddings, batch, begin))

    def logits(self, h: Tensor, batch: RaggedBatch) -> Tensor:
        """Logits (M, V) in the model dtype, of any M of the batch's hidden states: h (M, dim)."""
        return self.group.all_gather(self.ops.norm_lm_head(h, self.norm, self.output, self.params.norm_eps, batch))

    def suited(self, n_tokens: int, n_keys: int) -> AbstractContextManager[None]:
        """A block that runs n_tokens over up to n_keys of the cache, on one CPU thread if that is little work."""
        if self.device.type != "cpu":
            return nullcontext()
        attention = 2 * self.share.n_layers * self.share.n_heads * self.share.head_dim * n_keys
        return threads.for_work(n_tokens * (self._n_weights + attention), self._n_weights * self.dtype.itemsize)

    @with_default_settings
    @torch.inference_mode(False)
    def load_tensors(self, tensors: Iterable[tuple[str, Weight]]) -> None:
        """Set all weights from (Meta's name, weight) pairs in any order, packing each as soon as its parts are there.

        In a group, the weights are this process's slices. With a tied output, `output.weight` is the embedding and is
        not read. Raises ValueError for a name that is unexpected or repeated, a wrong shape, and missing names, and
        RuntimeError while a call, an open stream or an engine with requests uses the model.
        """
        self.check_idle()
        self.revision += 1  # before loading: a load that fails half-way has replaced tensors, too
        if hasattr(self, "cache"):
            self.cache.pool.forget()
        self._load(tensors)

    @with_default_settings
    @torch.inference_mode(False)
    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """Every weight by Meta's name and in Meta's shape, in the model dtype; in a group, this process's slices.

        Packed weights are returned as copies: change them through `load_state_dict`. Quantised ones are dequantised.
        """
        weights = {} if destination is None else destination
        for name, weight in self._unpacked_weights():
            weights[prefix + name] = weight if isinstance(weight, Tensor) else weight.dequantized(self.dtype)
        return cast(dict[str, Tensor], weights)

    @with_default_settings
    @torch.inference_mode(False)
    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> LoadedKeys:
        """Set the weights from a mapping in Meta's names; `rope.freqs` is ignored.

        strict=False ignores unknown names and keeps the weights that are missing, with their bits if they are quantised
        and no other scheme follows from the rest of their packed weight. The weights in the mapping are quantised as
        `quantize` says: without it, a mapping of all weights makes a model dense whose files were quantised. Raises
        ValueError, before anything is changed, listing names that are missing, unexpected or of another shape.
        """
        shapes, tied = self.share.shapes, self.params.tied_output
        keys = check_state_dict(state_dict, shapes, IGNORED_NAMES, tied_output=tied, strict=strict)
        current = dict(self._unpacked_weights()) if keys.missing_keys else {}
        self.load_tensors((name, weight) for name, weight in {**current, **state_dict}.items() if name in shapes)
        return keys

    @with_default_settings
    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Pack the weights again for another device or dtype: `.to(...)`, `.cuda()` and `.half()` call this."""
        sample = fn(self.norm.detach())
        if (sample.device, sample.dtype) == (self.device, self.dtype):
            return self
        check_quantize(self.quantize, self.share, sample.device, self.schemes)
        moved = {
            name: fn(weight) if isinstance(weight, Tensor) else weight.to(sample.device)
            for name, weight in self._unpacked_weights()
        }
        self.device, self.dtype = sample.device, sample.dtype
        self.ops = select.backend(self.backend, self.device, self.dtype)
        self.load_tensors(moved.items())
        self._allocate()
        return self

    def _allocate(self) -> None:
        """Allocate the rotary table, the cache and the workspace, for the current device and dtype."""
        p = self.share
        self.revision += 1
        sizes = p.n_layers, p.max_batch_size, p.n_kv_heads, p.max_seq_len, p.head_dim, p.cache_tokens
        memory = {"device": self.device, "dtype": self.dtype, "allocate": self.ops.allocate}
        self.cache = KVCache(*sizes, **memory)
        self.register_buffer("rope", rope_table(p, self.cache.length).to(self.device), persistent=False)
        self._allocate_workspace()

    @with_default_settings
    @torch.inference_mode(False)
    def allow_step_sizes(self, tokens_per_row: int, tokens: int) -> None:
        """Let decode steps have so many tokens of a row, and of all rows together: scratch memory for them."""
        sizes = max(self._step_sizes[0], tokens_per_row), max(self._step_sizes[1], tokens)
        if sizes != self._step_sizes:
            self._step_sizes, self.revision = sizes, self.revision + 1
            self._allocate_workspace()

    def _allocate_workspace(self) -> None:
        p = self.share
        self.workspace = self.ops.workspace(
            max_batch_size=p.max_batch_size,
            max_tokens_per_row=self._step_sizes[0],
            max_tokens=self._step_sizes[1],
            n_heads=p.n_heads,
            n_kv_heads=p.n_kv_heads,
            head_dim=p.head_dim,
            vocab_size=self.vocab_size,
            device=self.device,
        )

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """A block that holds the cache for one call. Raises RuntimeError while another call holds it."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(BUSY)
        try:
            with default_settings(), torch.inference_mode():  # the modes in which launches wrote to the workspace
                self.workspace.reset()
            yield
        finally:
            self._lock.release()

    def check_idle(self) -> None:
        """Raise RuntimeError while a call or an open stream holds the cache."""
        if self._lock.locked():
            raise RuntimeError(BUSY)

    @with_default_settings
    def __deepcopy__(self, memo: dict[int, Any]) -> "Transformer":
        rebuild, arguments = self.__reduce__()
        memo[id(self)] = copied = cast(Transformer, rebuild(*arguments))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle through weights in Meta's names, as packed weights, locks and backends cannot be pickled.

        Raises TypeError for one process's part of a shared model.
        """
        if self.group.size > 1:
            raise TypeError(
                f"a model that {self.group.size} processes share cannot be copied or pickled: build it again"
            )
        options = {"device": self.device, "dtype": self.dtype, "backend": self.backend, "quantize": self.quantize}
        return _rebuild, (self.params, options, dict(self._unpacked_weights()))


def _rebuild(params: ModelArgs, options: dict[str, Any], weights: dict[str, Weight]) -> Transformer:
    model = Transformer(params, **options, init_weights=False)
    model.load_tensors(weights.items())
    return model
