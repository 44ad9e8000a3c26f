"""The Llama 3 Transformer: five calls to the backend per layer.

`Transformer` holds the weights as its backend packs them, the rotary table and the key/value cache, speaks Meta's names
in `state_dict` and `load_state_dict`, and runs ragged batches: the tokens of any rows at any positions in one pass.
What the five calls compute stands in `fastllama.kernels.reference`.
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
from fastllama.distributed.parallel import SINGLE_PROCESS, Group
from fastllama.kernels import select
from fastllama.kernels.batch import RaggedBatch, Segment
from fastllama.packed_weights import Slot, slots
from fastllama.rope import rope_table
from fastllama.torch_settings import default_settings, with_default_settings

INIT_STD = 0.02
NO_WEIGHTS = "the model has no weights yet: load_state_dict or load_tensors first"
BUSY = "this model is busy with another call or an open stream: finish that one, or close it with .close()"


class Layer(nn.Module):
    """One layer's weights, in the slots of `fastllama.packed_weights`."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    ffn_norm: Tensor
    w13: Tensor
    w2: Tensor


class Transformer(nn.Module):
    """A Llama model with its cache. `params` are its ModelArgs, `ops` its backend, `cache` its KVCache.

    Where a group of processes shares the model, `share` are the ModelArgs of this one's part: its heads with their
    cache, its ffn width, its rows of the embedding and of the output. All of the group make the same calls.
    """

    tok_embeddings: Tensor
    norm: Tensor
    output: Tensor
    rope: Tensor

    def __init__(
        self,
        params: ModelArgs,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        init_weights: bool = True,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        """Allocate the cache and, unless `init_weights` is False (for weights that are loaded next), random weights.

        device and dtype default to torch's own, backend to the device's. group: the processes that share the model.
        Raises ValueError for an unknown vocabulary size or backend, and for sizes that the group cannot divide.
        """
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"the model needs to know its vocab_size, got {params.vocab_size}: set it in ModelArgs")
        # torch.get_default_device does not know of torch.set_default_tensor_type, which Meta's scripts call.
        device = torch.tensor(()).device if device is None else device
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
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
        self.ops = select.backend(backend, self.device)
        self._lock = threading.Lock()
        self.revision = 0  # of the tensors that launches name: another number, other tensors
        self.layers = nn.ModuleList(Layer() for _ in range(params.n_layers))
        for slot in slots(self, self.layers):
            slot.owner.register_parameter(slot.attribute, None)
        if init_weights:
            self.load_tensors(self._random_weights())
        self._allocate()

    @with_default_settings
    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Meta's signature: tokens (B, S) of rows 0 to B - 1, from position start_pos on -> float32 logits (B, S, V).

        What was cached before start_pos counts as each row's past. Raises ValueError for what does not fit the cache,
        RuntimeError while a generation or an open stream is using the cache.
        """
        with self.exclusively():
            if self.output is None:
                raise ValueError(NO_WEIGHTS)
            sizes = self.cache.max_batch_size, self.cache.max_seq_len, self.vocab_size
            start, rows, length = validate.forward(tokens, start_pos, *sizes)
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
        """Run the layers over a batch, appending its keys and values to the cache -> (N, dim)."""
        ops, eps, group = self.ops, self.params.norm_eps, self.group
        adds = group.rank == 0  # the residual, which is in every process, once
        h = self._embed(batch)
        for index, layer in enumerate(cast(Iterable[Layer], self.layers)):
            k, v = self.cache.layer(index)
            q = ops.norm_qkv_rope_append(h, layer.attention_norm, layer.wqkv, self.rope, k, v, eps, batch)
            h = group.all_reduce(
                ops.linear_residual(ops.attention(q, k, v, batch), layer.wo, h if adds else None, batch)
            )
            f = ops.norm_swiglu(h, layer.ffn_norm, layer.w13, eps, batch)
            h = group.all_reduce(ops.linear_residual(f, layer.w2, h if adds else None, batch))
        return h

    def _embed(self, batch: RaggedBatch) -> Tensor:
        """(N, dim), each token's row from the process that has it."""
        begin = self.group.rank * self.share.vocab_size if self.group.size > 1 else None
        return self.group.all_reduce(self.ops.embed(self.tok_embeddings, batch, begin))

    def logits(self, h: Tensor, batch: RaggedBatch) -> Tensor:
        """Of any M of a batch's hidden states, h (M, dim) -> (M, V) in the model dtype."""
        return self.group.all_gather(self.ops.norm_lm_head(h, self.norm, self.output, self.params.norm_eps, batch))

    def suited(self, n_tokens: int, n_keys: int) -> AbstractContextManager[None]:
        """A block that runs so many tokens over up to n_keys in the cache, on as many CPU threads as that is worth."""
        if self.device.type != "cpu":
            return nullcontext()
        attention = 2 * self.share.n_layers * self.share.n_heads * self.share.head_dim * n_keys
        return threads.suiting(n_tokens * (self._n_weights + attention), self._n_weights * self.dtype.itemsize)

    @with_default_settings
    @torch.inference_mode(False)
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take every weight, or the process's slice of it, by Meta's name, in any order; pack as soon as it can be.

        With a tied output, `output.weight` is the embedding and is not read. Raises ValueError, listing them, for names
        that are missing, unexpected, repeated or of another shape.
        """
        ignored = IGNORED_NAMES | ({"output.weight"} if self.params.tied_output else set())
        expected = {name: shape for name, shape in self.share.shapes.items() if name not in ignored}
        homes = {name: slot for slot in slots(self, self.layers) for name in slot.names}
        waiting: dict[str, Tensor] = {}
        self.revision += 1  # first: a load that breaks off half-way has replaced tensors, too
        for name, tensor in tensors:
            if name in ignored:
                continue
            if name not in expected:
                raise ValueError(f"weight {name!r} is none of this model's, or came twice: see ModelArgs.shapes")
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"weight {name!r} must have shape {expected[name]}, got {tuple(tensor.shape)}")
            waiting[name] = tensor
            del expected[name], tensor  # so that no more than one slot's weights are in memory twice
            slot = homes[name]
            if all(part in waiting for part in slot.names):
                self._set(slot, [waiting.pop(part) for part in slot.names])
        if expected:
            raise ValueError(f"{len(expected)} weights are missing: {validate.some(expected)}")
        if self.params.tied_output:  # one copy in memory where the backend packs nothing
            self.output = nn.Parameter(self.ops.pack(self.tok_embeddings.detach()), requires_grad=False)

    @with_default_settings
    @torch.inference_mode(False)
    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """Every weight by Meta's name and in Meta's shape, in the model dtype; in a group, this process's slice of it.

        Packed weights come as copies, so change a model through `load_state_dict`.
        """
        shapes, weights = self.share.shapes, {} if destination is None else destination
        for slot in slots(self, self.layers):
            packed = getattr(slot.owner, slot.attribute)
            if packed is None:
                raise ValueError(NO_WEIGHTS)
            packed = packed.detach()
            parts = (packed,) if slot.plain else self.ops.unpack(packed, [shapes[name][0] for name in slot.names])
            weights.update(zip((prefix + name for name in slot.names), parts, strict=True))
        return cast(dict[str, Tensor], weights)

    @with_default_settings
    @torch.inference_mode(False)
    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> validate.LoadedKeys:
        """Set the weights from a mapping in Meta's names; `rope.freqs` is ignored.

        strict=False keeps the weights that are missing and passes over names that are not the model's. Raises
        ValueError, before anything is changed, listing what is missing, unexpected or of another shape.
        """
        shapes, tied = self.share.shapes, self.params.tied_output
        found = validate.state_dict(state_dict, shapes, IGNORED_NAMES, tied_output=tied, strict=strict)
        kept = self.state_dict() if found.missing_keys else {}
        self.load_tensors((name, weight) for name, weight in {**kept, **state_dict}.items() if name in shapes)
        return found

    @with_default_settings
    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """What `.to(...)`, `.cuda()` and `.half()` call: weights packed for one device and dtype are packed anew."""
        sample = fn(self.norm.detach())
        if (sample.device, sample.dtype) == (self.device, self.dtype):
            return self
        moved = {name: fn(tensor) for name, tensor in self.state_dict().items()}
        self.device, self.dtype = sample.device, sample.dtype
        self.ops = select.backend(self.backend, self.device)
        self.load_tensors(moved.items())
        self._allocate()
        return self

    def _allocate(self) -> None:
        p = self.share
        self.revision += 1
        self.register_buffer("rope", rope_table(p).to(self.device), persistent=False)
        heads = p.n_kv_heads, p.max_seq_len, p.head_dim
        self.cache = KVCache(p.n_layers, p.max_batch_size, *heads, device=self.device, dtype=self.dtype)
        self.workspace = self.ops.workspace(
            max_batch_size=p.max_batch_size,
            n_heads=p.n_heads,
            n_kv_heads=p.n_kv_heads,
            head_dim=p.head_dim,
            vocab_size=self.vocab_size,
            device=self.device,
        )

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Hold the cache for one call. RuntimeError while another holds it."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(BUSY)
        try:
            with default_settings(), torch.inference_mode():  # as the launches are that leave something behind
                self.workspace.reset()
            yield
        finally:
            self._lock.release()

    def check_idle(self) -> None:
        """RuntimeError while a call or an open stream holds the cache."""
        if self._lock.locked():
            raise RuntimeError(BUSY)

    @with_default_settings
    def __deepcopy__(self, memo: dict[int, Any]) -> "Transformer":
        rebuild, arguments = self.__reduce__()
        memo[id(self)] = copied = cast(Transformer, rebuild(*arguments))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by weights in Meta's names: packed ones, locks and backends do neither.

        TypeError for a process's part of a model, which is nothing without the others'.
        """
        if self.group.size > 1:
            raise TypeError(
                f"a model that {self.group.size} processes share cannot be copied or pickled: build it again"
            )
        return _rebuild, (self.params, self.device, self.dtype, self.backend, self.state_dict())

    def _set(self, slot: Slot, parts: list[Tensor]) -> None:
        # A single part would keep sharing the caller's memory, or the mapped file's; several are concatenated anyway.
        moved = [part.detach().to(self.device, self.dtype, copy=len(parts) == 1) for part in parts]
        weight = moved[0].contiguous() if slot.plain else self.ops.pack(*moved)
        setattr(slot.owner, slot.attribute, nn.Parameter(weight, requires_grad=False))

    def _random_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.share.shapes.items():
            weight = torch.empty(shape, device=self.device, dtype=self.dtype)
            yield name, weight.fill_(1) if len(shape) == 1 else weight.normal_(0, INIT_STD)


def _rebuild(
    params: ModelArgs, device: torch.device, dtype: torch.dtype, backend: str | None, weights: dict[str, Tensor]
) -> Transformer:
    model = Transformer(params, device=device, dtype=dtype, backend=backend, init_weights=False)
    model.load_tensors(weights.items())
    return model
