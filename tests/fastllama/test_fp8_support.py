"""fp8 weights, asked for or stored in the files, are refused on GPUs that cannot convert them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import ModelArgs, Transformer
from fastllama.quantization import CHOICES, Scheme, check_quantize, model_schemes, quantized
from tests.support.checkpoints import random_weights, tiny_params

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PARAMS = tiny_params(hidden_dim=192)
ARGS = ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=16)
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


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_with_fp8_is_not_moved_to_such_a_gpu(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the weights were quantised when they were loaded, or in the files."""
    model = Transformer(ARGS, device=CPU, backend="reference", quantize="fp8" if asked else None, init_weights=False)
    weights: dict[str, Any] = random_weights(PARAMS, seed=3)
    if not asked:
        weights |= {name: quantized(weights[name], CHOICES["fp8"]) for name in PUBLISHED}
    model.load_tensors(weights.items())
    use_gpu(monkeypatch, (8, 0))
    moved = []

    def to_gpu(tensor: Tensor) -> Any:
        """As `.cuda()` moves a tensor; there may be no GPU here."""
        moved.append(tensor)
        return SimpleNamespace(device=CUDA, dtype=tensor.dtype)

    with pytest.raises(ValueError) as caught:
        model._apply(to_gpu)
    assert str(caught.value) == REFUSED
    assert len(moved) == 1 and model.device == CPU  # the norm whose device is asked for
    assert torch.equal(model.tok_embeddings, weights["tok_embeddings.weight"])


def test_fp8_weights_are_not_loaded_on_such_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, (8, 0))
    model = Transformer(ARGS, device=CPU, backend="reference", init_weights=False)
    model.device = CUDA
    name = "layers.0.attention.wo.weight"
    with pytest.raises(ValueError) as caught:
        model.load_tensors([(name, quantized(torch.zeros(ARGS.shapes[name]), CHOICES["fp8"]))])
    assert str(caught.value) == REFUSED


def test_a_cpu_is_not_asked_for_its_capability() -> None:
    check_quantize(None, ARGS, CPU, PUBLISHED)
