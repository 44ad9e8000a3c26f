"""Dependent launches on an NVIDIA GPU read no input too early: results are equal bit for bit over many steps."""

from typing import NamedTuple

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.gpu_report.probes import increment
from fastllama.decode_graph import Decoder
from fastllama.kernels.batch import SamplingTensors
from fastllama.kernels.launch.dependent import is_dependent
from fastllama.kernels.launch.options import override_launch_options
from fastllama.model import Transformer
from fastllama.output_copies import StepOutput
from fastllama.prefill import prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
DEVICE = torch.device("cuda")
# Wide enough that a launch takes several waves, and the last programs run while the next launch starts.
ARGS = ModelArgs(dim=2048, n_layers=4, n_heads=32, n_kv_heads=8, vocab_size=32768, max_batch_size=16, max_seq_len=256)
STEPS = 64
RUNS = 20
LAUNCHES = 1000


class Variant(NamedTuple):
    """One way to run the same steps."""

    dependent: bool
    prefetch: bool
    graphs: bool


PLAIN = Variant(dependent=False, prefetch=False, graphs=False)


@pytest.fixture(autouse=True)
def nan_in_empty_memory() -> None:
    """Disable the fixture: it fills memory by an ordinary launch before each kernel, so that kernels cannot overlap."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(5)
    return Transformer(ARGS, device=DEVICE, dtype=torch.bfloat16, backend="fused")


@torch.inference_mode()
def generated(model: Transformer, rows: int, temperature: float, variant: Variant) -> list[StepOutput]:
    prompts = [[1 + row * 7 + place for place in range(3 + 11 * row)] for row in range(rows)]
    sampling = SamplingTensors.of(temperature, 0.9, [(3, row, 0) for row in range(rows)], DEVICE)
    lengths = [len(prompt) for prompt in prompts]
    with override_launch_options(dependent=variant.dependent, prefetch=variant.prefetch), model.exclusively():
        decoder = Decoder(model, graphs=variant.graphs)
        decoder.start(
            [prompt[-1] for prompt in prompts], [n - 1 for n in lengths], [n + STEPS for n in lengths], [], sampling
        )
        decoder.sample_first(prefill(model, prompts)[0])
        found = decoder.receive()
        for _ in range(STEPS):
            decoder.enqueue_steps()
            found += decoder.receive()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_dependent_launch_prefetch_and_graph_do_not_change_results(
    model: Transformer, rows: int, temperature: float
) -> None:
    expected = generated(model, rows, temperature, PLAIN)
    for variant in (
        Variant(True, False, False),
        Variant(True, True, False),
        Variant(False, False, True),
        Variant(True, True, True),
    ):
        for _ in range(RUNS):
            assert generated(model, rows, temperature, variant) == expected, variant


@pytest.mark.parametrize("dependent", [False, True])
def test_a_launch_reads_what_the_previous_one_wrote(dependent: bool) -> None:
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with override_launch_options(dependent=dependent):
        for _ in range(LAUNCHES):
            increment(count)
    assert count.item() == LAUNCHES


def test_dependent_launch_is_the_default_from_capability_9_on() -> None:
    assert is_dependent() == (torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0))
