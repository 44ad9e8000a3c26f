"""Compiles the kernels of `warm_up` and then of a model's calls, ahead of time, without a GPU.

Prints as JSON which kernels only the calls compiled.
"""

import json

import torch

from fastllama import ModelArgs, Transformer
from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, Launch, record_launches
from fastllama.decode_graph import Decoder
from fastllama.kernels import fused
from fastllama.kernels.batch import SamplingTensors
from fastllama.prefill import prefill
from fastllama.warmup import warm_up

MAX_ROWS, MAX_TOKENS = 40, 128
ARGS = ModelArgs(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=512, max_batch_size=MAX_ROWS, max_seq_len=MAX_TOKENS
)
CPU = torch.device("cpu")
# Numbers of rows, and prompt lengths of a single row, on both sides of every boundary between classes.
ROWS = (*range(1, 20), 24, 31, 32, 33, 36, 39, 40)
ALONE = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 33, 64, 100, 127)


def main() -> None:
    model = Transformer(ARGS, device=CPU, dtype=torch.bfloat16, backend="reference", init_weights=False)
    model.ops = fused
    model.load_tensors((name, torch.zeros(shape)) for name, shape in ARGS.shapes.items())
    model._allocate()
    fused.supports_cuda_graphs = lambda device: True  # as on a GPU
    decoder = Decoder(model, graphs=False)
    with record_launches(GPUS["sm_90"]) as launches, torch.inference_mode():
        warm_up(decoder, [1, MAX_ROWS], progress=False)
        known = _kernels(launches)
        calls = [[1] * rows for rows in ROWS] + [[3 + row % 5 for row in range(rows)] for rows in ROWS]
        calls += [[tokens] for tokens in ALONE]
        later: dict[str, list[int]] = {}
        for lengths in calls:
            launches.clear()
            _call(decoder, [[1] * length for length in lengths])
            for key, kernel in _kernels(launches).items():
                if key not in known:
                    later.setdefault(f"{kernel} {key[:8]}", lengths)
    print(json.dumps({"calls": len(calls), "kernels": len(set(known.values())), "later": later}))


def _kernels(launches: list[Launch]) -> dict[str, str]:
    """The kernel's name by the hash of its compilation."""
    return {launch.compiled.hash: launch.kernel for launch in launches}


def _call(decoder: Decoder, prompts: list[list[int]]) -> None:
    """The start of a call: prefill, the first tokens and one step."""
    sampling = SamplingTensors.of(0.7, 0.9, [(1, row, 0) for row in range(len(prompts))], CPU)
    ends = [len(prompt) for prompt in prompts]
    with decoder.model.exclusively():
        decoder.start([1] * len(prompts), [end - 1 for end in ends], [end + 1 for end in ends], [], sampling)
        decoder.sample_first(prefill(decoder.model, prompts)[0])
        decoder.enqueue_steps()


if __name__ == "__main__":
    main()
