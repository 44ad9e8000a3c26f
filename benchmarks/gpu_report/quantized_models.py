"""A section of a GPU report: tokens per second of whole models with quantised weights, beside their goals."""

import gc
from dataclasses import replace

import torch

from fastllama.benchmarks.gpu_report.measurements import Bench, Results, median_rate, random_model
from fastllama.benchmarks.gpu_report.quantized_weights import supported_formats
from fastllama.benchmarks.gpu_report.sizes import ends
from fastllama.decode_graph import Decoder

FORMATS = ("int8", "fp8", "int4")
# Tokens per second of one row on one H200.
GOALS = {("3-8B", "int8"): 480, ("3-8B", "fp8"): 480, ("3-8B", "int4"): 700, ("3.2-1B", "int8"): 2300}


def quantized_models(bench: Bench) -> Results:
    """Decodes with every model in every format, one row and the most rows, after the shortest context.

    Each is built with random weights, which are quantised as those of a checkpoint are, and freed before the next.
    """
    sizes, device = bench.sizes, bench.device
    context = sizes.contexts[0]
    for name, args in sizes.models.items():
        for quantize in supported_formats(device, FORMATS):
            batches = ends(sizes.batches)
            args = replace(args, max_batch_size=batches[-1], max_seq_len=context + sizes.decoded)
            model = random_model(args, device, quantize=quantize)
            decoder = Decoder(model)
            for batch in batches:
                goal = GOALS.get((name, quantize)) if batch == 1 else None
                rate = median_rate(bench, name, decoder, batch, context)
                yield {"model": name, "quantize": quantize} | rate | {"goal_on_h200": goal}
            del decoder, model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
