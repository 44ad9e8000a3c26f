"""Models from files whose weights are quantised in several ways: what each packed weight becomes, and its plan."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import ModelArgs, Transformer
from fastllama.checkpoint import Checkpoint, open_checkpoint
from fastllama.distributed.model_parallel import Group
from fastllama.kernels.native import library
from fastllama.kernels.quantized import QuantizedWeight
from fastllama.memory_plan import plan_memory
from fastllama.quantization import CHOICES, Scheme, model_schemes, quantized, scheme_of_weight
from fastllama.speed_of_light import decode_step
from tests.support.adapters import random_factors, write_adapter
from tests.support.checkpoints import random_weights
from tests.support.quantized_folders import PARAMS, Parts, gptq_parts, linear_weights, packed, write_folder
from tests.support.tiers import parameters

CPU = torch.device("cpu")
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
OTHERS = ("v_proj", "up_proj", "down_proj")  # of the mixed folder, in int8
WARNING = (
    "weights that are applied together are not quantised alike, so those of them that are quantised are dequantised"
)


def compressed(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Parts:
    """A matrix as compressed-tensors packs it."""
    one = quantized(weight, scheme, integer_zeros=True)
    shape = {"weight_shape": torch.tensor(weight.shape)}
    if scheme.format == "int8":
        words = one.values.view(torch.uint8).bitwise_xor(0x80).view(torch.int32)
        return {"weight_packed": words, "weight_scale": one.scales, **shape}
    assert one.offsets is not None
    zeros = packed(one.offsets.to(torch.int64), 0)
    scales = one.scales.to(scale_dtype)
    return {"weight_packed": one.values.view(torch.int32), "weight_scale": scales, "weight_zero_point": zeros, **shape}


def folder(path: Path, others: dict[str, Any], scale_dtypes: Callable[[str], torch.dtype]) -> Checkpoint:
    """int4 with zeros in groups of 32, but OTHERS as `others` says."""
    groups: dict[str, Any] = {
        "all": {"targets": ["Linear"], "weights": INT4},
        "others": {"targets": [f"re:.*{end}" for end in OTHERS], "weights": others},
    }
    scheme = Scheme("int4", others["group_size"]) if others["num_bits"] == 4 else Scheme("int8")
    parts = {
        module: compressed(weight, scheme if module.endswith(OTHERS) else Scheme("int4", 32), scale_dtypes(module))
        for module, weight in linear_weights().items()
    }
    fields = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
    return open_checkpoint(write_folder(path, fields, parts))


def mixed(path: Path) -> Checkpoint:
    return folder(path, INT8, lambda module: torch.float16)


def mixed_groups(path: Path) -> Checkpoint:
    return folder(path, INT4 | {"group_size": 64}, lambda module: torch.float16)


def mixed_scales(path: Path) -> Checkpoint:
    return folder(path, INT4, lambda module: torch.bfloat16 if module.endswith(OTHERS) else torch.float16)


def adapted(path: Path) -> Checkpoint:
    """GPTQ's int4 with a LoRA of q and v."""
    shapes = {module: (weight.shape[0], weight.shape[1]) for module, weight in linear_weights().items()}
    parts = {module: gptq_parts(shape, 32, seed)[0] for seed, (module, shape) in enumerate(shapes.items())}
    base = write_folder(path / "base", {"quant_method": "gptq", "bits": 4, "group_size": 32}, parts)
    factors = random_factors(PARAMS, random_weights(PARAMS, seed=5), ["q_proj", "v_proj"], seed=1)
    return open_checkpoint(base, [write_adapter(path / "lora", factors, target_modules=["q_proj", "v_proj"])])


def loaded(
    checkpoint: Checkpoint, quantize: str | None, rank: int = 0, size: int = 1, backend: str = "reference"
) -> Transformer:
    args = ModelArgs(**checkpoint.params, max_batch_size=2, max_seq_len=16)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "backend": backend, "quantize": quantize}
    model = Transformer(args, device=CPU, init_weights=False, group=Group(rank, size), **options)
    model.load_tensors(checkpoint.tensors(rank, size))
    return model


def n_bytes(model: Transformer) -> int:
    return sum(size_of(getattr(one.owner, one.attribute)) for one in model.packed_weights())


def size_of(weight: Any) -> int:
    return int(weight.n_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes)


QUANTIZE = {str(name): name for name in (None, "int8", "int4", "int4-g32")}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("quantize", parameters(QUANTIZE, quick=("None", "int4")))
@pytest.mark.parametrize("write", [mixed, mixed_groups, mixed_scales, adapted])
def test_the_plan_knows_what_unlike_weights_become(
    tmp_path: Path,
    write: Callable[[Path], Checkpoint],
    quantize: str | None,
    world_size: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = write(tmp_path)
    args, stored = ModelArgs(**checkpoint.params, max_batch_size=2, max_seq_len=16), checkpoint.schemes(world_size)
    planned = model_schemes(quantize, args.split(world_size), stored)
    plan = plan_memory(args, torch.bfloat16, 2, 16, n_processes=world_size, quantize=quantize, stored=stored)
    for rank in range(world_size):
        caplog.clear()
        model = loaded(checkpoint, quantize, rank, world_size)
        assert model.schemes == planned
        assert plan.weights == n_bytes(model) + model.rope.nbytes
        messages = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert [message.startswith(WARNING) for message in messages] == [True] * (quantize is None)
        work = {one.name: one for one in decode_step(model.share, model.dtype, 1, 0, planned)}
        assert work["qkv"].bytes == size_of(model.layers[0].wqkv) + model.norm.nbytes
    if quantize is not None:  # all matrices are quantised
        assert planned.keys() == model_schemes(quantize, args.split(world_size)).keys()


@pytest.mark.parametrize("write", [mixed, adapted])
def test_unlike_weights_keep_their_values(tmp_path: Path, write: Callable[[Path], Checkpoint]) -> None:
    """Dequantised, they have the files' values in the model's dtype; quantised anew, those of the asked scheme."""
    checkpoint = write(tmp_path)
    dense = dict(checkpoint.dense_tensors())
    for name, tensor in loaded(checkpoint, None).state_dict().items():
        assert torch.equal(tensor, dense[name].bfloat16()), name
    anew = dict(loaded(checkpoint, "int4-g32")._unpacked_weights())
    for part in ("wq", "wk", "wv"):
        name = f"layers.0.attention.{part}.weight"
        weight, expected = anew[name], quantized(dense[name].float(), CHOICES["int4-g32"])
        assert isinstance(weight, QuantizedWeight) and scheme_of_weight(weight) == CHOICES["int4-g32"]
        assert torch.equal(weight.values, expected.values) and torch.equal(weight.scales, expected.scales)


@pytest.mark.parametrize("write", [mixed, mixed_scales, adapted])
def test_schemes_are_those_of_the_weights_that_are_read(tmp_path: Path, write: Callable[[Path], Checkpoint]) -> None:
    checkpoint = write(tmp_path)
    for world_size in (1, 2, 8):
        read = {
            name: scheme_of_weight(one)
            for name, one in checkpoint.tensors(0, world_size)
            if isinstance(one, QuantizedWeight)
        }
        assert checkpoint.schemes(world_size) == read


def test_a_row_of_one_group_is_a_group() -> None:
    """Its scale is 16 bits, and that of a row 32."""
    weight = quantized(torch.randn(8, 64), Scheme("int4", 64))
    assert scheme_of_weight(weight) == Scheme("int4", 64)
    assert scheme_of_weight(quantized(torch.randn(8, 64), Scheme("int8"))) == Scheme("int8")


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("quantize", [None, *CHOICES])
def test_weights_that_a_mapping_lacks_keep_their_bits(tmp_path: Path, quantize: str | None, backend: str) -> None:
    if backend == "native" and library.obstacle() is not None:
        pytest.skip("the native kernels were not built")
    model = loaded(adapted(tmp_path), quantize, backend=backend)
    before = dict(model._unpacked_weights())
    model.load_state_dict({"norm.weight": torch.full((PARAMS["dim"],), 3.0)}, strict=False)
    after = dict(model._unpacked_weights())
    assert torch.equal(model.norm, torch.full((PARAMS["dim"],), 3.0, dtype=torch.bfloat16))
    del before["norm.weight"]
    for name, one in before.items():
        other = after[name]
        if isinstance(one, Tensor) or isinstance(other, Tensor):
            assert isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(other, one), name
            continue
        assert scheme_of_weight(other) == scheme_of_weight(one), name
        assert torch.equal(other.values, one.values) and torch.equal(other.scales, one.scales), name
        assert one.offsets is None or (other.offsets is not None and torch.equal(other.offsets, one.offsets)), name


def test_a_mapping_of_all_weights_makes_a_model_from_quantised_files_dense(tmp_path: Path) -> None:
    model = loaded(adapted(tmp_path), None)
    assert model.schemes
    model.load_state_dict(model.state_dict())
    assert not model.schemes


def test_errors_about_values_name_the_weight() -> None:
    args = ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=16)
    weights = random_weights(PARAMS, seed=5)
    name = "layers.1.feed_forward.w3.weight"
    for value, message in (
        (torch.nan, "holds values that are not finite: the checkpoint is damaged; download it again"),
        (1e9, "int4 has scales in float16, and a weight is 1e+09: use int8"),
    ):
        damaged = weights[name].clone()
        damaged[3, 5] = value
        model = Transformer(args, device=CPU, backend="reference", quantize="int4", init_weights=False)
        with pytest.raises(ValueError) as caught:
            model.load_tensors((weights | {name: damaged}).items())
        assert str(caught.value) == f"{name}: {message}"
