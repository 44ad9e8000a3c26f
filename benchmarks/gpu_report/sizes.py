"""The sizes of a GPU report: those of real models, and toy sizes to rehearse it on a CPU."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastllama.args import ModelArgs
from fastllama.benchmarks.kernels_report.model_launches import MODELS


class Sizes(NamedTuple):
    """The sizes of every section, by default those for a GPU."""

    models: Mapping[str, ModelArgs]
    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (128, 2048, 8192)
    prompts: tuple[int, ...] = (512, 4096)  # lengths
    steps: int = 64  # timed decode steps of one rate
    warm_steps: int = 8  # before the timed ones
    boundary_launches: int = 200  # of a kernel that does almost nothing, in one graph
    unroll: int = 4  # steps per graph, compared with one step per graph
    calls_per_graph: int = 16  # of one op, so that the graph's own launch costs little in comparison
    repeats: int = 20
    rounds: int = 3  # of alternating variants
    guesses: tuple[int, ...] = (1, 2, 4, 7, 15)  # that a step checks
    requests: int = 256  # through the engine
    requests_at_a_time: tuple[int, ...] = (8, 32, 128)
    longest_prompt: int = 512  # of those requests
    longest_answer: int = 256
    other_launches: int = 16  # the most that are tried beside each launch of the tables
    read_bytes: int = 2**31
    rotated_bytes: int = 2**27  # of copies of a quantised weight, so that none stays in L2
    instruction_loops: int = 256  # of the kernel that times an instruction: 0.3 ms for the fastest
    seconds: float = 0.3  # to measure each ceiling

    @property
    def decoded(self) -> int:
        """Cache positions for the steps after a context."""
        return self.steps + self.warm_steps + 2 * self.unroll

    @property
    def positions(self) -> int:
        """Cache positions for every context with the steps after it, and for every prompt."""
        return max(max(self.contexts) + self.decoded, max(self.prompts))


def ends(values: Sequence[int]) -> list[int]:
    """The first and the last value, once if they are equal."""
    return list(dict.fromkeys((values[0], values[-1])))


FULL = Sizes({name: MODELS[name] for name in ("3-8B", "3.2-1B")})
TOY = Sizes(
    models={"toy": ModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=64, vocab_size=256)},
    batches=(1, 2),
    contexts=(12,),
    prompts=(20,),
    steps=1,
    warm_steps=1,
    boundary_launches=3,
    unroll=2,
    guesses=(1,),
    calls_per_graph=1,
    repeats=1,
    rounds=1,
    requests=3,
    requests_at_a_time=(1, 2),
    longest_prompt=9,
    longest_answer=3,
    other_launches=1,
    read_bytes=2**16,
    rotated_bytes=1,
    instruction_loops=1,
    seconds=0.0,
)
