"""The sections of a GPU report, each a function that brings what it finds one by one: ceilings and records.

A record is one flat JSON object. Models have random weights, and caches random numbers: zeros would cost less power.
Every rate is of greedy steps through `Decoder`, as `Llama.generate` runs them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.ceilings import Ceiling, MatmulProbe, ReadProbe, copy_ceiling
from fastllama.benchmarks.gpu_report.sizes import Sizes
from fastllama.benchmarks.models import RANDOM_SEED, random_tensors
from fastllama.benchmarks.statistics import GIGA, MICRO, MILLI, TERA, percentile, summarize
from fastllama.benchmarks.suites.step_launches import fill_cache, launch_times
from fastllama.benchmarks.timing import replayed, synchronize, time_calls
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.launch.options import override_launch_options
from fastllama.model import Transformer
from fastllama.prefill import prefill
from fastllama.speed_of_light import Machine, Work, decode_step, least_seconds, total_bytes, total_flops
from fastllama.speed_of_light import prefill as prefill_work

DTYPE = torch.bfloat16
WARMUP = 2
PREFILLS = 5  # repeats, at most: they take long
SPREAD = 3.0  # of random logits: a nucleus of some hundred tokens, more than a trained model's
Record = dict[str, Any]
Found = Iterator[Ceiling | Record]


@dataclass
class Bench:
    """The device, what is known of it, and the models that are on it."""

    device: torch.device
    sizes: Sizes
    results: Path  # the folder of result files
    end: float = math.inf  # by time.monotonic(), when the report has to be done
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    _models: dict[str, Transformer] = field(default_factory=dict)

    @property
    def machine(self) -> Machine | None:
        """From the ceilings: of the ways to read, the best. None where they could not be measured."""
        reads = [self.ceilings[name].value for name in ("read", "read_kernel") if name in self.ceilings]
        if not reads or "matmul" not in self.ceilings:
            return None
        return Machine(read=max(reads) * GIGA, matmul=self.ceilings["matmul"].value * TERA)

    def least(self, work: Iterable[Work]) -> float | None:
        """Seconds of all launches together, at best; None where the machine is unknown."""
        return None if self.machine is None else least_seconds(work, self.machine)

    def model(self, name: str) -> Transformer:
        """One of the sizes' models, of random weights, as the fused backend packs them."""
        if name not in self._models:
            args = ModelArgs(
                **self.sizes.models[name].whole,
                max_batch_size=max(self.sizes.batches),
                max_seq_len=self.sizes.positions,
            )
            model = Transformer(args, device=self.device, dtype=DTYPE, backend="fused", init_weights=False)
            model.load_tensors(random_tensors(args, RANDOM_SEED, self.device, DTYPE))
            self._models[name] = model
        return self._models[name]

    def median_seconds(self, run: Callable[[], object]) -> float:
        """Of a run whose launches are replayed from a graph."""
        repeats = self.sizes.repeats
        times = time_calls(
            replayed(run, self.device), device=self.device, warmup=min(WARMUP, repeats - 1), repeats=repeats
        )
        return percentile(times, 50)


def ceilings(bench: Bench) -> Found:
    """What the machine does at best: read, by torch and by a kernel that loads as ours do, copy, multiply."""
    from fastllama.benchmarks.gpu_report.probes import READ_BLOCK, read

    sizes, device = bench.sizes, bench.device
    probe = ReadProbe(device, sizes.read_bytes)
    probe.sample(sizes.seconds)
    yield probe.ceiling()
    blocks = max(1, sizes.read_bytes // (2 * READ_BLOCK))
    source = torch.randn(blocks * READ_BLOCK, device=device, dtype=torch.float16)
    times = time_calls(lambda: read(source), device=device, repeats=sizes.repeats, seconds=sizes.seconds)
    rates = summarize(source.numel() * source.element_size() / second / GIGA for second in times)
    yield Ceiling("read_kernel", "GB/s", f"a kernel of {READ_BLOCK * 2} bytes a program", rates)
    yield copy_ceiling(device, sizes.read_bytes, sizes.seconds)
    products = MatmulProbe(device, DTYPE, None if device.type == "cuda" else 16)
    products.sample(sizes.seconds)
    yield products.ceiling()


def boundaries(bench: Bench) -> Found:
    """What it costs that a launch follows another: launches that do nothing, each needing the one before."""
    from fastllama.benchmarks.gpu_report.probes import tick

    count = torch.zeros(1, dtype=torch.int32, device=bench.device)

    def ticks() -> None:
        for _ in range(bench.sizes.ticks):
            tick(count)

    for dependent in (False, True):
        with override_launch_options(dependent=dependent):
            seconds = bench.median_seconds(ticks)
        n_launches = bench.sizes.ticks
        yield {"dependent_launch": dependent, "launches": n_launches, "microseconds": MICRO * seconds / n_launches}


def launches(bench: Bench) -> Found:
    """Each launch of a decode step against the speed of light."""
    sizes = bench.sizes
    cases = [(batch, sizes.contexts[0]) for batch in sizes.batches] + [(1, sizes.contexts[-1])]
    for batch, context in dict.fromkeys(cases):
        for name in sizes.models:
            for one in launch_times(bench.model(name), batch, context, repeats=sizes.repeats):
                record = one.against(bench.machine)
                record["microseconds"] = record["microseconds"]["p50"]
                yield {"model": name, "batch": batch, "context": context, **record}


def decode(bench: Bench) -> Found:
    """Tokens a second at every batch and context, as users get them: of some runs, the middle one."""
    for context in bench.sizes.contexts:
        for batch in bench.sizes.batches:
            for name in bench.sizes.models:
                decoder = Decoder(bench.model(name))
                runs = [_rate(bench, name, decoder, batch, context) for _ in range(bench.sizes.rounds)]
                runs.sort(key=lambda record: record["tokens_per_second"])
                rates = [record["tokens_per_second"] for record in runs]
                yield runs[len(runs) // 2] | {"slowest": rates[0], "fastest": rates[-1]}


def switches(bench: Bench) -> Found:
    """What the graph, the dependent launch, its prefetches and unrolling bring: rounds of all variants in turn."""
    context = bench.sizes.contexts[0]
    for name in bench.sizes.models:
        model = bench.model(name)
        graphs = None if bench.device.type == "cuda" else False
        variants: dict[str, tuple[dict[str, bool], Callable[[], Decoder]]] = {
            "as it is": ({}, partial(Decoder, model, graphs=graphs)),
            "without prefetch": ({"prefetch": False}, partial(Decoder, model, graphs=graphs)),
            "without dependent launch": ({"dependent": False}, partial(Decoder, model, graphs=graphs)),
            "without graph": ({}, partial(Decoder, model, graphs=False)),
            f"{bench.sizes.unroll} steps a graph": (
                {},
                partial(Decoder, model, graphs=graphs, unroll=bench.sizes.unroll),
            ),
        }
        for batch in dict.fromkeys((bench.sizes.batches[0], bench.sizes.batches[-1])):
            decoders = {variant: make() for variant, (_, make) in variants.items()}
            rates: dict[str, list[float]] = {variant: [] for variant in variants}
            dependent: dict[str, bool] = {}
            for _ in range(bench.sizes.rounds):
                for variant, (how, _) in variants.items():
                    with override_launch_options(**how):  # while its graph is captured, the first time
                        record = _rate(bench, name, decoders[variant], batch, context)
                    rates[variant].append(record["tokens_per_second"])
                    dependent[variant] = record["dependent_launch"]
            usual = percentile(rates["as it is"], 50)
            for variant, found in rates.items():
                rate = percentile(found, 50)
                yield {
                    "model": name,
                    "batch": batch,
                    "context": context,
                    "variant": variant,
                    "dependent_launch": dependent[variant],
                    "tokens_per_second": rate,
                    "ratio": rate / usual,
                }


@torch.inference_mode()
def _rate(bench: Bench, name: str, decoder: Decoder, batch: int, context: int) -> Record:
    """Greedy steps behind a context of random keys and values -> what one took, and the limit."""
    model, sizes = decoder.model, bench.sizes
    warm_steps, timed_steps = (-(-n // decoder.unroll) * decoder.unroll for n in (sizes.warm_steps, sizes.steps))
    n_steps = warm_steps + timed_steps
    sampling = SamplingTensors.of(0.0, 0.0, [(1, row, 0) for row in range(batch)], bench.device)
    with model.exclusively():
        fill_cache(model, batch, context)
        decoder.start(
            [row + 1 for row in range(batch)], [context - 1] * batch, [context + n_steps] * batch, [], sampling
        )
        synchronize(bench.device)
        arrivals: list[float] = []
        wanted = n_steps
        while wanted > 0 or decoder.queued:
            while wanted > 0 and decoder.queued <= decoder.replays_ahead:
                decoder.enqueue_steps()
                wanted -= decoder.unroll
            for _ in decoder.receive():
                arrivals.append(time.perf_counter())
    seconds = (arrivals[-1] - arrivals[warm_steps - 1]) / timed_steps
    work = decode_step(model.params, model.dtype, batch, context + n_steps / 2)
    least = bench.least(work)
    return {
        "model": name,
        "batch": batch,
        "context": context,
        "dependent_launch": decoder.dependent,
        "tokens_per_second": batch / seconds,
        "step_milliseconds": MILLI * seconds,
        "least_milliseconds": None if least is None else MILLI * least,
        "share": None if least is None else least / seconds,
        "gb_per_second": total_bytes(work) / seconds / GIGA,
    }


@torch.inference_mode()
def prompts(bench: Bench) -> Found:
    """How fast one prompt is taken in, and the share of the matmul rate."""
    generator = torch.Generator().manual_seed(1)
    for length in bench.sizes.prompts:
        for name in bench.sizes.models:
            model = bench.model(name)
            prompt = torch.randint(model.vocab_size, (length,), generator=generator).tolist()
            with model.exclusively():
                times = time_calls(
                    lambda: prefill(model, [prompt]),  # noqa: B023 (called here and now)
                    device=bench.device,
                    warmup=1,
                    repeats=min(PREFILLS, bench.sizes.repeats),
                )
            seconds = percentile(times, 50)
            work = prefill_work(model.params, model.dtype, [length])
            rate, least, machine = total_flops(work) / seconds, bench.least(work), bench.machine
            yield {
                "model": name,
                "tokens": length,
                "milliseconds": MILLI * seconds,
                "least_milliseconds": None if least is None else MILLI * least,
                "tokens_per_second": length / seconds,
                "tflops": rate / TERA,
                "share_of_matmul": None if machine is None else rate / machine.matmul,
            }


@torch.inference_mode()
def sampling(bench: Bench) -> Found:
    """The two launches that choose tokens: the most likely one, from a nucleus, and from a row where all are alike."""
    name = next(iter(bench.sizes.models))
    model = bench.model(name)
    spread = (SPREAD * torch.randn(max(bench.sizes.batches), model.vocab_size, device=bench.device)).to(DTYPE)
    for batch in dict.fromkeys((bench.sizes.batches[0], bench.sizes.batches[-1])):
        positions = torch.arange(batch, device=bench.device)
        for case, logits, temperature in (
            ("greedy", spread, 0.0),
            ("top_p 0.9 at 0.6", spread, 0.6),
            ("top_p 0.9 at 1", spread, 1.0),
            ("top_p 0.9, flat", torch.zeros_like(spread), 1.0),
        ):
            how = SamplingTensors.of(temperature, 0.9, [(1, row, 0) for row in range(batch)], bench.device)
            rows = logits[:batch].contiguous()
            call = partial(model.ops.sample, rows, how, positions, model.workspace)

            def chain(call: Callable[[], object] = call) -> None:
                for _ in range(bench.sizes.chain):
                    call()

            with model.exclusively():
                microseconds = MICRO * bench.median_seconds(chain) / bench.sizes.chain
            yield {"vocabulary": model.vocab_size, "batch": batch, "case": case, "microseconds": microseconds}
