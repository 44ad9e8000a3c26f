"""Sections of a GPU report. A section is a function that yields what it measures, one ceiling or record at a time.

A record is a flat JSON object. Weights and caches hold random numbers, because a GPU uses less power for zeros. Decode
rates are measured on greedy steps of `Decoder`, which `Llama.generate` uses.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.ceilings import Ceiling, MatmulProbe, Probe, ReadProbe, copy_ceiling, machine_of
from fastllama.benchmarks.gpu_report.sizes import Sizes, ends
from fastllama.benchmarks.models import RANDOM_SEED, random_tensors
from fastllama.benchmarks.statistics import GIGA, MICRO, MILLI, TERA, percentile
from fastllama.benchmarks.suites.op_cases import LOGITS_STD, TOP_P
from fastllama.benchmarks.suites.step_launches import fill_cache, launch_times
from fastllama.benchmarks.timing import replayed, synchronize, time_calls
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.launch.options import override_launch_options
from fastllama.kernels.sampling.masks import TokenMasks
from fastllama.model import Transformer
from fastllama.output_copies import StepOutput
from fastllama.prefill import prefill
from fastllama.speed_of_light import Machine, Work, decode_step, least_seconds, total_bytes, total_flops
from fastllama.speed_of_light import prefill as prefill_work

DTYPE = torch.bfloat16
WARMUP = 2
MAX_PREFILLS = 5  # timed repeats of a prefill, which takes long
UNCHANGED = "as it is"  # the variant that others are compared with
Record = dict[str, Any]
Results = Iterator[Ceiling | Record]


@dataclass
class Bench:
    """What all sections share: the device, its ceilings, and the models on it."""

    device: torch.device
    sizes: Sizes
    results: Path  # the folder of result files
    end: float = math.inf  # the time.monotonic() by which the report must be done
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    _models: dict[str, Transformer] = field(default_factory=dict)

    @property
    def machine(self) -> Machine | None:
        """The machine's rates, with the higher of the two read rates; None if they were not measured."""
        reads = [self.ceilings[name].value for name in ("read", "read_kernel") if name in self.ceilings]
        if not reads or "matmul" not in self.ceilings:
            return None
        return machine_of(max(reads), self.ceilings["matmul"].value)

    def least(self, work: Iterable[Work]) -> float | None:
        """The least seconds of all launches together; None if the machine's rates are unknown."""
        return None if self.machine is None else least_seconds(work, self.machine)

    def model(self, name: str) -> Transformer:
        """The model of this name in `sizes`, on the fused backend."""
        if name not in self._models:
            sizes = self.sizes
            args = replace(sizes.models[name], max_batch_size=max(sizes.batches), max_seq_len=sizes.positions)
            self._models[name] = random_model(args, self.device)
        return self._models[name]

    def microseconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """The median µs per call. With a GPU, all calls are in one CUDA graph."""

        def run() -> None:
            for call in calls:
                call()

        repeats = self.sizes.repeats
        times = time_calls(
            replayed(run, self.device), device=self.device, warmup=min(WARMUP, repeats - 1), repeats=repeats
        )
        return MICRO * percentile(times, 50) / len(calls)


def random_model(
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype = DTYPE,
    backend: str = "fused",
    quantize: str | None = None,
) -> Transformer:
    """A model with random weights."""
    options: dict[str, Any] = {"dtype": dtype, "backend": backend, "quantize": quantize}
    model = Transformer(args, device=device, init_weights=False, **options)
    model.load_tensors(random_tensors(args, RANDOM_SEED, device, dtype))
    return model


def sampling_tensors(n_rows: int, device: torch.device, temperature: float = 0.0) -> SamplingTensors:
    """The sampling parameters of rows with a random stream each; greedy by default."""
    return SamplingTensors.of(temperature, TOP_P, [(1, row, 0) for row in range(n_rows)], device)


def decode_steps(decoder: Decoder, n_steps: int) -> Iterator[StepOutput]:
    """Run steps, with replays queued ahead of the one that is received. Yields each step's output."""
    while n_steps > 0 or decoder.queued:
        while n_steps > 0 and decoder.queued <= decoder.replays_ahead:
            decoder.enqueue_steps()
            n_steps -= decoder.unroll
        yield from decoder.receive()


def ceilings(bench: Bench) -> Results:
    """The machine's rates: reads by torch, reads by a kernel that loads like matvec, copies, and matmuls."""
    from fastllama.benchmarks.gpu_report.probes import READ_BLOCK, block_sums

    sizes, device = bench.sizes, bench.device
    blocks = max(1, sizes.read_bytes // (2 * READ_BLOCK))
    source = torch.randn(blocks * READ_BLOCK, device=device, dtype=torch.float16)
    method, call = f"a kernel of {READ_BLOCK * 2} bytes a program", partial(block_sums, source)
    kernel_probe = Probe("read_kernel", "GB/s", method, device, call, source.nbytes / GIGA)
    matmul_probe = MatmulProbe(device, DTYPE, None if device.type == "cuda" else 16)
    for probe in (ReadProbe(device, sizes.read_bytes), kernel_probe):
        probe.sample(sizes.seconds)
        yield probe.ceiling()
    yield copy_ceiling(device, sizes.read_bytes, sizes.seconds)
    matmul_probe.sample(sizes.seconds)
    yield matmul_probe.ceiling()


def boundaries(bench: Bench) -> Results:
    """The time from one launch to the next. Each launch only increments the result of the one before."""
    from fastllama.benchmarks.gpu_report.probes import increment

    count = torch.zeros(1, dtype=torch.int32, device=bench.device)
    n_launches = bench.sizes.boundary_launches
    for dependent in (False, True):
        with override_launch_options(dependent=dependent):
            microseconds = bench.microseconds([partial(increment, count)] * n_launches)
        yield {"dependent_launch": dependent, "launches": n_launches, "microseconds": microseconds}


def launches(bench: Bench) -> Results:
    """Each launch of a decode step, with the least time that it could take."""
    sizes = bench.sizes
    cases = [(batch, sizes.contexts[0]) for batch in sizes.batches] + [(1, sizes.contexts[-1])]
    for batch, context in dict.fromkeys(cases):
        for name in sizes.models:
            for one in launch_times(bench.model(name), batch, context, repeats=sizes.repeats):
                record = one.against(bench.machine)
                record["microseconds"] = record["microseconds"]["p50"]
                yield {"model": name, "batch": batch, "context": context, **record}


def decode(bench: Bench) -> Results:
    """Tokens per second at every batch size and context."""
    for context in bench.sizes.contexts:
        for batch in bench.sizes.batches:
            for name in bench.sizes.models:
                yield median_rate(bench, name, Decoder(bench.model(name)), batch, context)


def median_rate(bench: Bench, name: str, decoder: Decoder, batch: int, context: int) -> Record:
    """Tokens per second: the median of several runs, with the slowest and the fastest."""
    runs = [rate(bench, name, decoder, batch, context) for _ in range(bench.sizes.rounds)]
    runs.sort(key=lambda record: record["tokens_per_second"])
    rates = [record["tokens_per_second"] for record in runs]
    return runs[len(runs) // 2] | {"slowest": rates[0], "fastest": rates[-1]}


def switches(bench: Bench) -> Results:
    """The effect of the graph, dependent launches, prefetches and unrolling: variants run in turn."""
    context, unroll = bench.sizes.contexts[0], bench.sizes.unroll
    # Keywords of `override_launch_options` and of Decoder.
    variants: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
        UNCHANGED: ({}, {}),
        "without prefetch": ({"prefetch": False}, {}),
        "without dependent launch": ({"dependent": False}, {}),
        "without graph": ({}, {"graphs": False}),
        f"{unroll} steps a graph": ({}, {"unroll": unroll}),
    }
    for name in bench.sizes.models:
        for batch in ends(bench.sizes.batches):
            decoders = {variant: Decoder(bench.model(name), **keywords) for variant, (_, keywords) in variants.items()}
            runs: dict[str, list[Record]] = {variant: [] for variant in variants}
            for _ in range(bench.sizes.rounds):
                for variant, (options, _) in variants.items():
                    with override_launch_options(**options):  # the first round captures the graph
                        runs[variant].append(rate(bench, name, decoders[variant], batch, context))
            rates = {name: percentile([run["tokens_per_second"] for run in found], 50) for name, found in runs.items()}
            for variant, found_rate in rates.items():
                yield {
                    "model": name,
                    "batch": batch,
                    "context": context,
                    "variant": variant,
                    "dependent_launch": runs[variant][-1]["dependent_launch"],
                    "tokens_per_second": found_rate,
                    "ratio": found_rate / rates[UNCHANGED],
                }


@torch.inference_mode()
def rate(bench: Bench, name: str, decoder: Decoder, batch: int, context: int) -> Record:
    """The rate of greedy steps after a context of random keys and values, and the least time of a step.

    Of steps that check guesses, tokens a second are those of steps whose guesses are all wrong.
    """
    model, sizes = decoder.model, bench.sizes
    warm_steps, timed_steps = (-(-n // decoder.unroll) * decoder.unroll for n in (sizes.warm_steps, sizes.steps))
    n_steps = warm_steps + timed_steps
    end = context + n_steps * decoder.positions_ahead // decoder.unroll
    tokens, positions, last = [row + 1 for row in range(batch)], [context - 1] * batch, [end] * batch
    with model.exclusively():
        decoder.start(tokens, positions, last, [], sampling_tensors(batch, bench.device))
        fill_cache(model, batch, context)  # after the rows have their pages
        synchronize(bench.device)
        received = [time.perf_counter() for _ in decode_steps(decoder, n_steps)]
    seconds = (received[-1] - received[warm_steps - 1]) / timed_steps
    work = decode_step(model.params, model.dtype, batch, context + n_steps / 2, model.schemes)
    least = bench.least(work)
    return {
        "model": name,
        "batch": batch,
        "context": context,
        "dependent_launch": decoder.dependent,
        "tokens_per_second": batch / seconds,
        "step_milliseconds": MILLI * seconds,
        "least_milliseconds": least and MILLI * least,
        "share": least and least / seconds,
        "step_gb": total_bytes(work) / GIGA,
        "gb_per_second": total_bytes(work) / seconds / GIGA,
    }


@torch.inference_mode()
def prefills(bench: Bench) -> Results:
    """The time of a prefill of one prompt, and its share of the matmul rate."""
    generator = torch.Generator().manual_seed(1)
    for length in bench.sizes.prompts:
        for name in bench.sizes.models:
            model = bench.model(name)
            prompt = torch.randint(model.vocab_size, (length,), generator=generator).tolist()
            repeats = min(MAX_PREFILLS, bench.sizes.repeats)
            with model.exclusively():
                times = time_calls(partial(prefill, model, [prompt]), device=bench.device, warmup=1, repeats=repeats)
            seconds = percentile(times, 50)
            work = prefill_work(model.params, model.dtype, [length])
            flops, least, machine = total_flops(work) / seconds, bench.least(work), bench.machine
            yield {
                "model": name,
                "tokens": length,
                "milliseconds": MILLI * seconds,
                "least_milliseconds": least and MILLI * least,
                "tokens_per_second": length / seconds,
                "tflops": flops / TERA,
                "share_of_matmul": machine and flops / machine.matmul,
            }


@torch.inference_mode()
def sampling(bench: Bench) -> Results:
    """The launches that sample a token: greedy, with top-p, with top-p from equal logits; and masks before them."""
    name = next(iter(bench.sizes.models))
    model = bench.model(name)
    spread = (LOGITS_STD * torch.randn(max(bench.sizes.batches), model.vocab_size, device=bench.device)).to(DTYPE)
    for batch in ends(bench.sizes.batches):
        positions = torch.arange(batch, device=bench.device)
        for case, logits, temperature in (
            ("greedy", spread, 0.0),
            ("top_p 0.9 at 0.6", spread, 0.6),
            ("top_p 0.9 at 1", spread, 1.0),
            ("top_p 0.9, flat", torch.zeros_like(spread), 1.0),
        ):
            params, rows = sampling_tensors(batch, bench.device, temperature), logits[:batch].contiguous()
            call = partial(model.ops.sample, rows, params, positions, model.workspace)
            with model.exclusively():
                microseconds = bench.microseconds([call] * bench.sizes.calls_per_graph)
            yield {"vocabulary": model.vocab_size, "batch": batch, "case": case, "microseconds": microseconds}
        for n_masked, case in {batch: "masks, of all rows", 1: "masks, of one row"}.items():
            masks = TokenMasks.of(batch, model.vocab_size, bench.device)
            masks.has_mask[:n_masked] = True
            call = partial(model.ops.mask_logits, spread[:batch].clone(), masks, positions)
            microseconds = bench.microseconds([call] * bench.sizes.calls_per_graph)
            yield {"vocabulary": model.vocab_size, "batch": batch, "case": case, "microseconds": microseconds}
