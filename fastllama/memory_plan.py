"""The memory plan: how much memory a model needs, computed before it is allocated, and how much is free."""

import contextlib
import errno
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fastllama import cgroups
from fastllama.args import OUTPUT_NAME, ModelArgs
from fastllama.cache import n_pages
from fastllama.cgroups import FreeMemory
from fastllama.distributed import environment
from fastllama.kernels.paged_cache import PAGE_TOKENS, pages_for
from fastllama.kernels.quantized import ELEMENTS_AT_ONCE
from fastllama.kernels.reference import QUERY_BLOCK_TOKENS
from fastllama.prefill import PREFILL_CHUNK_TOKENS
from fastllama.quantization import NOTHING_QUANTIZED, Scheme, bytes_of, model_schemes
from fastllama.speculation import most_step_tokens
from fastllama.token_scores import SCORE_CHUNK_TOKENS

try:
    import resource
except ImportError:  # on Windows, which has no such limits
    resource = None  # type: ignore[assignment]

KIB, GIB = 2**10, 2**30
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
FLOAT32_BYTES, INDEX_BYTES = 4, 8
# How many activations of each width a forward pass holds at once, per token, rounded up.
WIDTHS_OF_DIM = 4  # the residual stream, its norm in float32 (twice a bfloat16), the output that is added to it
WIDTHS_OF_HEADS = 3  # queries and keys before and after the rotary embedding, the attention's output
WIDTHS_OF_HIDDEN = 4  # gate and up, the activated gate, their product
QUANTIZING_COPIES = 12  # of the rows that are quantised together, in float32
STATE_BYTES_PER_LOGIT = 10  # stop tokens, and controls where a request has them: biases, counts, tokens of the prompt
SAMPLING_BYTES_PER_LOGIT = 64  # float64 probabilities, sorted and accumulated, their order and masks


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device."""

    weights: int
    cache: int
    workspace: int  # the most that a forward pass or loading needs on top

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


class DoesNotFit(MemoryError, ValueError):
    """A model does not fit the free memory."""


def plan_memory(
    args: ModelArgs,
    dtype: torch.dtype,
    max_batch_size: int,
    max_seq_len: int,
    *,
    n_processes: int = 1,
    quantize: str | None = None,
    stored: Mapping[str, Scheme] = NOTHING_QUANTIZED,
    n_guesses: int | None = 0,
) -> MemoryPlan:
    """The memory that a model of this shape needs on its device, or on each of `n_processes` that share it.

    quantize: as in `Llama.build`. stored: how the weights are quantised that are quantised in the files. n_guesses:
    of a row, that a decode step checks; None: as many as pay off.
    """
    size = dtype.itemsize
    vocab_size, args = args.vocab_size, args.split(n_processes)
    n_kv_heads, head_dim, hidden_dim = args.n_kv_heads, args.head_dim, args.hidden_dim
    shapes = dict(args.shapes)
    schemes = model_schemes(quantize, args, stored)
    quantized = {name: bytes_of(scheme, shapes[name]) for name, scheme in schemes.items()}
    if args.tied_output and OUTPUT_NAME not in quantized:  # backends keep one copy of both
        del shapes[OUTPUT_NAME]
    weights = [quantized.get(name, math.prod(shape) * size) for name, shape in shapes.items()]
    rope = pages_for(max_seq_len) * PAGE_TOKENS * head_dim * FLOAT32_BYTES
    cache_pages = n_pages(max_batch_size, max_seq_len, args.cache_tokens) + 1  # and one that belongs to no row
    cache = 2 * args.n_layers * cache_pages * n_kv_heads * PAGE_TOKENS * head_dim * size
    n_tokens = min(PREFILL_CHUNK_TOKENS, max_batch_size * max_seq_len)
    per_token = (
        WIDTHS_OF_DIM * args.dim * FLOAT32_BYTES
        + WIDTHS_OF_HEADS * (args.n_heads + 2 * n_kv_heads) * head_dim * FLOAT32_BYTES
        + WIDTHS_OF_HIDDEN * hidden_dim * size
    )
    queries = min(QUERY_BLOCK_TOKENS, max_seq_len) * args.n_heads // n_kv_heads
    mask = queries * max_seq_len * (2 + size)  # booleans, their repetition for each group, and numbers to add
    logits = size if n_processes == 1 else 3 * size  # this process's, all as gathered, and reordered
    scoring = SCORE_CHUNK_TOKENS * vocab_size * (logits + 2 * FLOAT32_BYTES)
    sampling = most_step_tokens(max_batch_size, n_guesses) * vocab_size * (logits + SAMPLING_BYTES_PER_LOGIT)
    state = max_batch_size * (vocab_size * STATE_BYTES_PER_LOGIT + (0 if n_guesses == 0 else max_seq_len * INDEX_BYTES))
    forward = n_tokens * per_token + mask + max(scoring, sampling) + state
    loading = max(math.prod(shape) for shape in shapes.values()) * size  # a weight, before it is packed
    if quantized:
        largest = max(math.prod(shapes[name]) for name in quantized)
        loading += QUANTIZING_COPIES * min(largest, ELEMENTS_AT_ONCE) * FLOAT32_BYTES
        forward += largest * FLOAT32_BYTES  # dequantised for a long prompt
    return MemoryPlan(sum(weights) + rope, cache, max(forward, loading))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device for a new model, or for this process's part of it."""
    return free_memory_and_limit(device).free


def free_memory_and_limit(device: torch.device) -> FreeMemory:
    """The free memory under the tightest limit (machine, container or process), and that limit's name."""
    if device.type == "cuda":
        # torch's allocator keeps the memory of deleted models, which a new model can use.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FreeMemory(int(torch.cuda.mem_get_info(device)[0]) + cached, f"on {device}")
    machine = FreeMemory(int(psutil.virtual_memory().available), "on this machine")
    free, limit = min(machine, cgroups.free_memory() or machine)
    return min([FreeMemory(free // environment.local_world_size(), limit), *process_limits()])


def process_limits(root: Path = Path("/")) -> list[FreeMemory]:
    """The memory left under each limit of this process (ulimit -v and -d)."""
    if resource is None:
        return []
    limits = []
    kinds = ((resource.RLIMIT_AS, "VmSize", "ulimit -v"), (resource.RLIMIT_DATA, "VmData", "ulimit -d"))
    for number, used, name in kinds:
        limit = resource.getrlimit(number)[0]
        if limit != resource.RLIM_INFINITY:
            used_bytes = _status_bytes(root / "proc/self/status", used)
            limits.append(FreeMemory(max(0, limit - used_bytes), f"under {name} {limit // KIB}"))
    return limits


def _status_bytes(path: Path, name: str) -> int:
    """The value of a line of /proc/self/status, in bytes; 0 if there is no such line."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return int(lines[name].split()[0]) * KIB
    except (OSError, KeyError, ValueError, IndexError):
        return 0


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device) -> Iterator[None]:
    """A block that turns a failed allocation on a CPU into DoesNotFit, which names the tightest limit."""
    try:
        yield
    except DoesNotFit:
        raise
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        if device.type != "cpu" or not _is_out_of_memory(error):
            raise
        free, limit = free_memory_and_limit(device)
        raise DoesNotFit(
            f"out of memory: {free / GIB:.2f} GiB are free {limit}; use a smaller model, max_batch_size or "
            "max_seq_len, or raise the limit"
        ) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a failed allocation, which each library reports in its own words."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, ValueError) and any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS):
            return True
        error = error.__cause__
    return False


def check_fits(
    args: ModelArgs,
    dtype: torch.dtype,
    free: int,
    *,
    limit: str = "on this machine",
    n_processes: int = 1,
    quantize: str | None = None,
    stored: Mapping[str, Scheme] = NOTHING_QUANTIZED,
    n_guesses: int | None = 0,
) -> MemoryPlan:
    """The plan for `args`. Raises DoesNotFit, which names sizes that would fit, if it needs more than `free` bytes.

    limit: what limits the memory, for the error message.
    """

    how: dict[str, Any] = {"n_processes": n_processes, "quantize": quantize, "stored": stored, "n_guesses": n_guesses}

    def plan(max_batch_size: int, max_seq_len: int, cache_tokens: int | None = args.cache_tokens) -> MemoryPlan:
        sizes = (replace(args, cache_tokens=cache_tokens), dtype, max_batch_size, max_seq_len)
        return plan_memory(*sizes, **how)

    needed = plan(args.max_batch_size, args.max_seq_len)
    if needed.total <= free:
        return needed
    rows = _largest_that_fits(args.max_batch_size, lambda rows: plan(rows, args.max_seq_len).total <= free)
    length = _largest_that_fits(args.max_seq_len, lambda length: plan(args.max_batch_size, length).total <= free)
    precision = quantize or (f"{dtype}, weights as stored," if stored else dtype)
    tokens = most_cache_tokens(
        args, dtype, free, n_processes=n_processes, quantize=quantize, stored=stored, n_guesses=n_guesses
    )
    remedies = [f"max_batch_size={rows} would fit"] * (rows > 0) + [f"max_seq_len={length} would fit"] * (length > 0)
    remedies += [f"cache_tokens={tokens} for all rows together would fit"] * (tokens >= args.max_seq_len)
    raise DoesNotFit(
        f"max_batch_size={args.max_batch_size} with max_seq_len={args.max_seq_len} in {precision} needs "
        f"{needed.total / GIB:.2f} GiB (weights {needed.weights / GIB:.2f}, cache {needed.cache / GIB:.2f}, "
        f"workspace {needed.workspace / GIB:.2f}) and {free / GIB:.2f} GiB are free {limit}: "
        + (
            ", or ".join(remedies)
            or "not even one row of one token would fit; use a smaller dtype, quantize, or another device"
        )
    )


def most_cache_tokens(
    args: ModelArgs,
    dtype: torch.dtype,
    free: int,
    *,
    n_processes: int = 1,
    quantize: str | None = None,
    stored: Mapping[str, Scheme] = NOTHING_QUANTIZED,
    n_guesses: int | None = 0,
) -> int:
    """The most positions, of all rows together, for which a model of these rows fits in `free` bytes; 0 if none do."""

    def fits(pages: int) -> bool:
        shape = replace(args, cache_tokens=pages * PAGE_TOKENS)
        sizes = shape, dtype, args.max_batch_size, args.max_seq_len
        return (
            plan_memory(*sizes, n_processes=n_processes, quantize=quantize, stored=stored, n_guesses=n_guesses).total
            <= free
        )

    most = n_pages(args.max_batch_size, args.max_seq_len)
    return PAGE_TOKENS * _largest_that_fits(most + 1, fits)


def _largest_that_fits(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `below` that fits, 0 if none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
