"""Dependent launches on an NVIDIA GPU: what begins early reads nothing early. Bit for bit, over many steps."""

from typing import NamedTuple

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.gpu_report.probes import increment
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.launch.dependent import is_dependent
from fastllama.kernels.launch.options import switched
from fastllama.model import Transformer
from fastllama.output_copies import StepOutput
from fastllama.prefill import prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
DEVICE = torch.device("cuda")
# Wide enough for launches of several waves, whose last programs run while the next launch begins.
ARGS = ModelArgs(dim=2048, n_layers=4, n_heads=32, n_kv_heads=8, vocab_size=32768, max_batch_size=16, max_seq_len=256)
STEPS = 64
RUNS = 20
TICKS = 1000


class How(NamedTuple):
    """One way to run the same steps."""

    launch: bool
    prefetch: bool
    graphs: bool


PLAIN = How(launch=False, prefetch=False, graphs=False)


@pytest.fixture(autouse=True)
def nan_in_empty_memory() -> None:
    """Not here: filling what is allocated is an ordinary launch before each kernel, and leaves nothing to overlap."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(5)
    return Transformer(ARGS, device=DEVICE, dtype=torch.bfloat16, backend="fused")


@torch.inference_mode()
def gained(model: Transformer, rows: int, temperature: float, how: How) -> list[StepOutput]:
    prompts = [[1 + row * 7 + place for place in range(3 + 11 * row)] for row in range(rows)]
    sampling = SamplingTensors.of(temperature, 0.9, [(3, row, 0) for row in range(rows)], DEVICE)
    places = [len(prompt) for prompt in prompts]
    with switched(launch=how.launch, prefetch=how.prefetch), model.exclusively():
        decoder = Decoder(model, graphs=how.graphs)
        decoder.begin(
            [prompt[-1] for prompt in prompts], [p - 1 for p in places], [p + STEPS for p in places], [], sampling
        )
        decoder.choose(prefill(model, prompts)[0])
        found = decoder.receive()
        for _ in range(STEPS):
            decoder.launch()
            found += decoder.receive()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_nothing_changes_with_dependent_launch_prefetch_and_graph(
    model: Transformer, rows: int, temperature: float
) -> None:
    expected = gained(model, rows, temperature, PLAIN)
    for how in (How(True, False, False), How(True, True, False), How(False, False, True), How(True, True, True)):
        for _ in range(RUNS):
            assert gained(model, rows, temperature, how) == expected, how


@pytest.mark.parametrize("launch", [False, True])
def test_a_launch_finds_what_the_one_before_wrote(launch: bool) -> None:
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with switched(launch=launch):
        for _ in range(TICKS):
            increment(count)
    assert count.item() == TICKS


def test_dependent_launch_is_the_default_from_capability_9_on() -> None:
    assert is_dependent() == (torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0))
