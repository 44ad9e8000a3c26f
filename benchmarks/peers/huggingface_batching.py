"""Hugging Face's continuous batching of LlamaForCausalLM as a peer: its manager, whose thread runs the requests.

All requests are submitted at once, and the manager runs as many at a time as it may: so a request starts when the
manager takes it up, and no step is lost to the way between two threads. The cache has pages for all of them. Everything
else is its default, prefix cache and attention included (without flash attention, `sdpa` under a mask).
"""

import math
import time
from functools import partial
from typing import Any

from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.huggingface import llama_model
from fastllama.benchmarks.peers.worker import Serve
from fastllama.benchmarks.runners import ServedRun, Workload

NO_STOP_TOKEN = -1
SPARE_BLOCKS = 1  # for each request, so that no admission waits for memory
POLL_SECONDS = 1.0


def build_server(spec: ModelSpec, request: dict[str, Any]) -> Serve:
    """LlamaForCausalLM holding the weights of `spec`."""
    return partial(serve, llama_model(spec), spec.max_batch_size, spec.max_seq_len)


def serve(model: Any, n_rows: int, max_seq_len: int, workload: Workload, with_logprobs: bool) -> ServedRun:
    """Greedy answers to all requests. The manager and its cache are new, and made before the clock starts."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts, output_lens, max_concurrency = workload
    config = ContinuousBatchingConfig(
        max_requests_per_batch=min(max_concurrency, n_rows), return_logprobs=with_logprobs
    )
    config.num_blocks = max_concurrency * (math.ceil(max_seq_len / config.page_size) + SPARE_BLOCKS)
    greedy = GenerationConfig(do_sample=False, eos_token_id=NO_STOP_TOKEN)
    found: dict[int, Any] = {}
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
        begin = time.perf_counter()
        for place, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True)):
            manager.add_request(prompt, str(place), length, record_timestamps=True)
        while len(found) < len(prompts):
            output = manager.get_result(timeout=POLL_SECONDS)
            if output is None and not manager.is_running():
                raise RuntimeError(f"its thread ended: {manager.background_thread_status.fatal_error!r}")
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(output.error)
                found[int(output.request_id)] = output
    outputs = [found[place] for place in range(len(prompts))]
    return ServedRun(
        tokens=[output.generated_tokens for output in outputs],
        starts=[output.lifespan[0] - begin for output in outputs],
        times=[[moment - begin for moment in output.timestamps] for output in outputs],
        logprobs=[output.logprobs for output in outputs] if with_logprobs else None,
    )
