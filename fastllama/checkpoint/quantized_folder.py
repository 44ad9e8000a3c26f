"""Hugging Face folders with a quantization_config: which method it is, and the tensors of each quantised module."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

from fastllama.checkpoint.compressed_tensors import CompressedTensors
from fastllama.checkpoint.gptq_awq import Awq, Gptq
from fastllama.checkpoint.json_config import JsonConfig, short_repr
from fastllama.checkpoint.quantized_tensor import FLOAT_DTYPES, USE_ORIGINAL, QuantizedTensor
from fastllama.checkpoint.safetensors_files import SafetensorsTensor

CONFIG_KEY = "quantization_config"
LINEAR_ENDS = ("_proj.weight", "lm_head.weight")


class Method(Protocol):
    """A way of quantising, as config.json describes it. Modules have transformers' names."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The last parts of the names of tensors that belong to a quantised module."""

    def take(self, tensors: dict[str, SafetensorsTensor], module: str) -> dict[str, SafetensorsTensor]:
        """Remove a module's parts from `tensors`, and return those that are read; {} if it is not quantised."""

    def tensor(
        self, folder: Path, module: str, parts: dict[str, SafetensorsTensor], shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The matrix (OUT, IN) of a module. ValueError if its parts do not have the shapes that this requires."""


METHODS: dict[str, Callable[[JsonConfig], Method]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}


def quantization_method(config: JsonConfig) -> Method | None:
    """The method of a checkpoint; None if it is not quantised. ValueError for one that is not read."""
    section = config.section(CONFIG_KEY)
    if section is None:
        return None
    name = section.values.get("quant_method", "unknown")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise ValueError(
            f"{config.path}: {CONFIG_KEY} marks a quantised checkpoint whose method is not read here (quant_method "
            f"{short_repr(name)}); take one of {', '.join(METHODS)}, or {USE_ORIGINAL}"
        )
    return method(section)


def take_modules(
    method: Method, tensors: dict[str, SafetensorsTensor], expected: Collection[str]
) -> dict[str, dict[str, SafetensorsTensor]]:
    """Remove the parts of quantised modules from `tensors` -> those parts by module and name.

    expected: the names of the model's weights and biases. GPTQ's programs also write biases of zeros, which are removed
    if the model has none.
    """
    modules = linear_modules(expected)
    taken = {module: parts for module in modules if (parts := method.take(tensors, module))}
    for module in taken:
        name = f"{module}.bias"
        bias = None if name in expected else tensors.get(name)
        if bias is not None and bias.stored_dtype in FLOAT_DTYPES and not bool(bias.read().any()):
            del tensors[name]
    return taken


def part_names(method: Method, expected: Collection[str]) -> set[str]:
    """The names that parts of all modules may have."""
    return {f"{module}.{part}" for module in linear_modules(expected) for part in method.part_names}


def linear_modules(names: Iterable[str]) -> list[str]:
    """The modules with a matrix that can be quantised, by transformers' names, of weights' names."""
    weights = (name.removesuffix(".weight") for name in names if name.endswith(LINEAR_ENDS))
    return list(weights)
