"""Reads the quantization_config of compressed-tensors: which modules are quantised, and how their weights are stored.

A scheme names its modules by name, by a regular expression after "re:", or by class; for a module, the names go before
the expressions and these before the class, as in the package. Modules in `ignore` are not quantised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastllama.checkpoint.expressions import Expression
from fastllama.checkpoint.json_config import JsonConfig, short_repr
from fastllama.checkpoint.quantized_tensor import USE_ORIGINAL, group_size_in_memory

PACKED = "pack-quantized"
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", PACKED)
STRATEGIES = ("tensor", "channel", "group")
OTHER_FIELDS = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
DENSE = "dense"
LINEAR = "Linear"  # the class of every module of a Llama that can be quantised
REGEX = "re:"
COLUMNS_IN_ORDER = (None, False, "static", "weight")  # of actorder


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of some modules are stored.

    Attributes:
        format: int8, int4 or fp8.
        group_size: columns that share a scale in the file; 0 if a row, or the whole matrix, has one.
        is_symmetric: whether there are no zero points.
        is_packed: whether numbers are packed in 32-bit words.
    """

    format: str
    group_size: int
    is_symmetric: bool
    is_packed: bool


class CompressedTensorsConfig:
    """A checked quantization_config. ValueError for what cannot be read.

    quantizes_activations: whether activations are meant to be quantised, too.
    """

    def __init__(self, config: JsonConfig) -> None:
        """config: the section quantization_config."""
        for key in OTHER_FIELDS:
            section = config.section(key)
            if section and section.values.get("format") != DENSE:
                raise _error(config, key, "nothing: it changes the cache, the activations or the weights")
        self._ignored = [_test(config, "ignore", text) for text in _texts(config, "ignore")]
        groups = config.section("config_groups")
        if groups is None:
            raise config.error("config_groups", "an object of schemes")
        self.quantizes_activations = False
        self._schemes: list[tuple[int, Callable[[str], bool], WeightScheme | None]] = []
        for name in groups.values:
            self._add_group(config, groups, name)
        self._schemes.sort(key=lambda entry: entry[0])

    def scheme_of(self, module: str) -> WeightScheme | None:
        """The scheme of a linear module, given transformers' name; None if it is not quantised."""
        if any(fits(module) for fits in self._ignored):
            return None
        return next((scheme for _, fits, scheme in self._schemes if fits(module)), None)

    def _add_group(self, config: JsonConfig, groups: JsonConfig, name: str) -> None:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "an object with targets and weights")
        scheme = _weight_scheme(config, group)
        self.quantizes_activations |= any(group.section(key) for key in ("input_activations", "output_activations"))
        for text in _texts(group, "targets"):
            if text == "Embedding":
                raise _error(group, "targets", "linear modules: the embedding is not quantised")
            rank = 2 if text == LINEAR else 1 if text.startswith(REGEX) else 0
            self._schemes.append((rank, _test(group, "targets", text), scheme))


def _weight_scheme(config: JsonConfig, group: JsonConfig) -> WeightScheme | None:
    """The scheme of a group; None if it leaves the weights as they are."""
    weights = group.section("weights")
    if weights is None:
        return None
    layout = group if group.has("format") else config
    if layout.values.get("format") not in FORMATS:
        raise _error(layout, "format", f"one of {', '.join(FORMATS)}")
    is_packed = layout.values["format"] == PACKED
    kind, bits = weights.values.get("type", "int"), weights.integer("num_bits", 8)
    names = {("int", 4): "int4"} if is_packed else {("float", 8): "fp8"}
    name = ({("int", 8): "int8"} | names).get((kind, bits)) if isinstance(kind, str) else None
    if name is None:
        raise _error(weights, "num_bits", "8 bits of int or float, or 4 packed bits of int", f" of {short_repr(kind)}")
    if weights.values.get("actorder") not in COLUMNS_IN_ORDER:
        raise _error(weights, "actorder", "null, false, 'static' or 'weight', so that columns are in their own order")
    strategy, size = weights.values.get("strategy"), weights.values.get("group_size")
    if strategy is None:  # the package's default
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in STRATEGIES:
        raise _error(weights, "strategy", f"one of {', '.join(STRATEGIES)}")
    is_symmetric = weights.flag("symmetric", True)
    if not is_symmetric and name != "int4":
        raise _error(weights, "symmetric", f"true, as {name} has no zero points here")
    group_size = weights.integer("group_size") if strategy == "group" else 0
    if group_size and group_size_in_memory(group_size) is None:
        raise _error(weights, "group_size", "a multiple of 32")
    return WeightScheme(name, group_size, is_symmetric, is_packed)


def _error(config: JsonConfig, key: str, expected: str, beside: str = "") -> ValueError:
    return ValueError(f"{config.error(key, expected)}{beside}; {USE_ORIGINAL}")


def _texts(config: JsonConfig, key: str) -> list[str]:
    """A list of texts; [] if it is absent."""
    value: Any = [] if config.values.get(key) is None else config.values[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise config.error(key, "a list of texts")
    return value


def _test(config: JsonConfig, key: str, text: str) -> Callable[[str], bool]:
    """Whether a module is one that a target means."""
    if text == LINEAR:
        return lambda module: True
    if not text.startswith(REGEX):
        return lambda module: module == text
    try:
        return Expression(text.removeprefix(REGEX)).match
    except ValueError as error:
        name = config.full_name(key)
        raise ValueError(
            f"{config.path}: field {name!r}: expected names or regular expressions, got {short_repr(text)}: {error}; "
            "name the modules instead"
        ) from error
