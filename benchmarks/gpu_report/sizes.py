"""What a GPU report runs on: the sizes of real models, and toy ones with which it can be rehearsed on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastllama.benchmarks.kernels_report.model_launches import MODELS, Shape


@dataclass(frozen=True)
class Sizes:
    """Of every section."""

    models: Mapping[str, Shape]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int  # of a decode rate
    warm_steps: int  # before those
    ticks: int  # launches of one graph that does nothing else
    unroll: int  # steps of one graph, to be compared with one
    chain: int  # calls of an op in one graph, so that its own launch is small beside them
    repeats: int
    rounds: int  # of variants in turn
    neighbours: int  # of each launch in the tables, at most
    read_bytes: int
    seconds: float  # of each ceiling

    @property
    def positions(self) -> int:
        """Of the cache: every context, the steps after it, and every prompt."""
        return max(max(self.contexts) + self.steps + self.warm_steps + 2 * self.unroll, max(self.prompts))


FULL = Sizes(
    models={name: MODELS[name] for name in ("3-8B", "3.2-1B")},
    batches=(1, 4, 16),
    contexts=(128, 2048, 8192),
    prompts=(512, 4096),
    steps=64,
    warm_steps=8,
    ticks=200,
    unroll=4,
    chain=16,
    repeats=20,
    rounds=3,
    neighbours=16,
    read_bytes=2**31,
    seconds=0.3,
)
TOY = Sizes(
    models={"toy": Shape(1, 32, 2, 1, 16, 64, 256)},
    batches=(1, 2),
    contexts=(12,),
    prompts=(20,),
    steps=1,
    warm_steps=1,
    ticks=3,
    unroll=2,
    chain=1,
    repeats=1,
    rounds=1,
    neighbours=1,
    read_bytes=2**16,
    seconds=0.0,
)
