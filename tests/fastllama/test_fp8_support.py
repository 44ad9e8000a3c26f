"""fp8 weights, asked for or stored in the files, are refused on GPUs that cannot convert them."""

import pytest
import torch

from fastllama import ModelArgs
from fastllama.quantization import Scheme, check_quantize, model_schemes
from tests.support.checkpoints import tiny_params

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ARGS = ModelArgs(**tiny_params(hidden_dim=192))
PUBLISHED = model_schemes("fp8", ARGS)  # as a checkpoint with fp8 weights stores them
REFUSED = (
    "fp8 weights need a GPU of compute capability 8.9 or later, and NVIDIA A100 has 8.0: use quantize='int8', which "
    "has as many bits"
)


def use_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Run as on a machine with a GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")


def test_fp8_is_refused_where_the_gpu_cannot_convert_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, (8, 0))
    one = {"layers.1.feed_forward.w2.weight": Scheme("fp8")}
    for quantize, stored in (("fp8", {}), (None, PUBLISHED), ("fp8", PUBLISHED), (None, one)):
        with pytest.raises(ValueError) as caught:
            check_quantize(quantize, ARGS, CUDA, stored)
        assert str(caught.value) == REFUSED


@pytest.mark.parametrize("quantize", ["int8", "int4-g32"])
def test_stored_fp8_may_be_quantised_anew(quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy that the message names works, and so does int4."""
    use_gpu(monkeypatch, (8, 0))
    check_quantize(quantize, ARGS, CUDA, PUBLISHED)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_fp8_is_accepted_by_gpus_that_convert_it(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, capability)
    check_quantize("fp8", ARGS, CUDA)
    check_quantize(None, ARGS, CUDA, PUBLISHED)


def test_a_cpu_is_not_asked_for_its_capability() -> None:
    check_quantize(None, ARGS, CPU, PUBLISHED)
