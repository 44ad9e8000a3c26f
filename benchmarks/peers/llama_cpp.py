"""llama.cpp as a peer, through the low-level interface of the package llama-cpp-python.

Weights are passed as a GGUF file in the model's dtype, or in Q8_0 and Q4_0 where ours are int8 and int4. Each row is a
sequence with a cache of its own. For a model in float32 the cache is float32 and flash attention is off, because it
rounds: log-probabilities differ by 3e-3. In other dtypes both are llama.cpp's defaults, a float16 cache and flash
attention where the device has it.
Each step is one `llama_decode` of all rows, and this module chooses the most likely tokens. llama.cpp splits the
prompts into batches of 512 tokens.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.gguf_file import write_gguf
from fastllama.benchmarks.peers.worker import Generate, Recorder, scores_of, unsupported_biases, unsupported_rope
from fastllama.benchmarks.runners import Run

ROPE_TYPES = ("default", "linear", "llama3")  # rope_freqs.weight holds frequencies, not YaRN's attention factor
MAX_ROWS = 256  # LLAMA_MAX_SEQ
CACHE_MULTIPLE = 256  # positions of a sequence's cache are a multiple of this
ALL_LAYERS = -1
LOG_LEVEL_ERROR = 4

_log_callbacks: list[Any] = []  # llama.cpp calls them as long as the process runs


def unsupported(args: ModelArgs) -> str | None:
    """The reason why llama.cpp cannot run this model, or None."""
    if args.max_batch_size > MAX_ROWS:
        return f"llama.cpp takes at most {MAX_ROWS} rows, not {args.max_batch_size}"
    code = "the GGUF file for llama.cpp"
    return unsupported_biases(code, args) or unsupported_rope(code, args, ROPE_TYPES)


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """A context of llama.cpp holding the weights of `spec`."""
    import llama_cpp

    if spec.device.type == "cuda" and not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("this llama-cpp-python is built without CUDA")
    path = Path(request["folder"], "model.gguf")
    write_gguf(spec, path)
    return partial(generate, Context(spec, path))


class Context:
    """A model of llama.cpp with its caches."""

    def __init__(self, spec: ModelSpec, path: Path) -> None:
        """Load the GGUF file of `spec` at `path`. RuntimeError with llama.cpp's message if that fails."""
        import llama_cpp

        self._library, self._vocab_size = llama_cpp, spec.args.vocab_size
        self.device = spec.device
        errors = _collect_errors(llama_cpp)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        on_gpu = spec.device.type == "cuda"
        model_params.n_gpu_layers = ALL_LAYERS if on_gpu else 0
        model_params.main_gpu = spec.device.index or 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if model is None:
            raise RuntimeError(f"llama.cpp does not load the weights: {' '.join(errors)}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = spec.max_batch_size
        params.n_ctx = spec.max_batch_size * math.ceil(spec.max_seq_len / CACHE_MULTIPLE) * CACHE_MULTIPLE
        params.n_batch = params.n_ctx  # the most tokens of one llama_decode
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        if spec.dtype == torch.float32:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = False
        params.offload_kqv = params.op_offload = on_gpu
        self._context = llama_cpp.llama_init_from_model(model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp does not create its caches: {' '.join(errors)}")
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def clear(self) -> None:
        """Empty the caches."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def decode(self, tokens: list[list[int]], starts: list[int]) -> list[np.ndarray]:
        """Append each row's tokens at its position `starts[row]`. Returns the logits (V,) after each row's last token.

        The logits are valid until the next call.
        """
        batch, count = self._batch, 0
        last = []
        for row, (row_tokens, start) in enumerate(zip(tokens, starts, strict=True)):
            for position, token in enumerate(row_tokens, start):
                batch.token[count], batch.pos[count] = token, position
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = False
                count += 1
            last.append(count - 1)
            batch.logits[count - 1] = True
        batch.n_tokens = count
        if code := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returns {code}")
        pointers = [self._library.llama_get_logits_ith(self._context, index) for index in last]
        return [np.ctypeslib.as_array(pointer, (self._vocab_size,)) for pointer in pointers]


def _collect_errors(library: Any) -> list[str]:
    """A list to which llama.cpp's error messages are added. Its other messages are dropped."""
    errors: list[str] = []

    def log(level: int, text: bytes, _: Any) -> None:
        if level == LOG_LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())

    _log_callbacks.append(library.llama_log_callback(log))
    library.llama_log_set(_log_callbacks[-1], None)
    return errors


def generate(context: Context, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each prompt."""
    tokens: list[list[int]] = [[] for _ in prompts]
    inputs, starts = prompts, [0] * len(prompts)
    context.clear()
    recorder = Recorder(len(prompts), context.device, with_logprobs)
    for _ in range(steps):
        logits = context.decode(inputs, starts)
        chosen = [int(row.argmax()) for row in logits]
        recorder.end_step()
        if with_logprobs:
            recorder.add_scores(*scores_of(torch.from_numpy(np.stack(logits)), torch.tensor(chosen)))
        for row, token in enumerate(chosen):
            tokens[row].append(token)
        starts = [start + len(row) for start, row in zip(starts, inputs, strict=True)]
        inputs = [[token] for token in chosen]
    return recorder.run(tokens)
