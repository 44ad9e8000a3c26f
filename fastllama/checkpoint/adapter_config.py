"""Reads PEFT's adapter_config.json: the rank and the scale of every module, and the modules that it names.

A field that changes what the adapter means, and that this reader does not apply, is an error that names it.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllama.checkpoint.expressions import Expression
from fastllama.checkpoint.json_config import JsonConfig, short_repr
from fastllama.checkpoint.unsupported_formats import ADAPTER_CONFIG_NAME, MERGE_WITH_PEFT

READ_FIELDS = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "init_lora_weights"),
)
# They matter for training, or only with a field that is refused.
IGNORED_FIELDS = (
    *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout", "layers_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "qalora_group_size",
)
# Refused unless null, false or empty; each with what it means.
REFUSED_FIELDS = {
    "use_dora": "DoRA scales the merged rows",
    "modules_to_save": "these modules are stored complete, not as LoRA",
    "bias": "biases were trained, too",
    "lora_bias": "biases were trained, too",
    "fan_in_fan_out": "the factors are those of transposed weights",
    "layer_replication": "layers are repeated, so the model is another one",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "parameters that are not modules were trained",
    "use_qalora": "the factors are those of grouped inputs",
    "use_bdlora": "the factors are block-diagonal",
    "alora_invocation_tokens": "it applies only after these tokens",
    "arrow_config": "it chooses between adapters for every token",
    "ensure_weight_tying": "embedding and output share one adapter",
}
# PEFT cannot merge these either.
NEVER_MERGED = ("use_qalora", "alora_invocation_tokens", "arrow_config")
HARMLESS_VALUES: tuple[Any, ...] = (None, False, "none", "", [], {})
# Other initialisations, such as "pissa", "olora", "corda" and "loftq", also change the base's weights.
KEEPS_BASE_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
ALL_LINEAR = "all-linear"
LINEAR_SUFFIX = "_proj"
LAYER_OF_MODULE = re.compile(r"model\.layers\.([0-9]+)\.")


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json. Modules have transformers' names: "model.layers.0.self_attn.q_proj", "lm_head"."""

    config: JsonConfig
    _ranks: dict[Expression, int]
    _alphas: dict[Expression, float]
    _targets: list[tuple[str, Expression]]
    _excluded: list[tuple[str, Expression]]
    _layers: frozenset[int] | None

    @classmethod
    def read(cls, folder: Path, n_layers: int) -> "AdapterConfig":
        """The configuration in a folder, for a base of `n_layers`. ValueError if it is damaged or cannot be merged."""
        config = JsonConfig.read(folder / ADAPTER_CONFIG_NAME)
        if config.values.get("peft_type") != "LORA":
            error = config.error("peft_type", "'LORA', the only kind that can be merged here")
            raise ValueError(f"{error}; {MERGE_WITH_PEFT}")
        _refuse_fields(config)
        config.integer("r")
        config.number("lora_alpha")
        config.flag("use_rslora")
        ranks, alphas = config.section("rank_pattern"), config.section("alpha_pattern")
        return cls(
            config,
            {_module_pattern(ranks, key): ranks.integer(key) for key in ranks.values} if ranks else {},
            {_module_pattern(alphas, key): alphas.number(key) for key in alphas.values} if alphas else {},
            _module_names(config, "target_modules"),
            _module_names(config, "exclude_modules"),
            _layers(config, n_layers),
        )

    @property
    def base(self) -> str:
        """The base model that the adapter names, for messages."""
        name = self.config.values.get("base_model_name_or_path")
        return short_repr(name) if isinstance(name, str) and name else "one that it does not name"

    def rank(self, module: str) -> int:
        """r, or the rank of the first key of rank_pattern that matches."""
        return next((rank for key, rank in self._ranks.items() if key.fullmatch(module)), self.config.integer("r"))

    def scale(self, module: str) -> float:
        """The factor of B·A: alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = next(
            (alpha for key, alpha in self._alphas.items() if key.fullmatch(module)), self.config.number("lora_alpha")
        )
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.flag("use_rslora") else rank)

    def missing_targets(self, modules: Collection[str], present: Collection[str]) -> list[str]:
        """What target_modules names and `present` lacks: modules of the model, or a name that fits none of them."""
        missing: dict[str, None] = {}
        for text, pattern in self._targets:
            meant = [module for module in modules if pattern.fullmatch(module)]
            absent = [module for module in meant if module not in present and self._is_wanted(module)]
            missing.update(dict.fromkeys([text] if not meant or absent == meant else absent))
        return list(missing)

    def _is_wanted(self, module: str) -> bool:
        layer = LAYER_OF_MODULE.match(module)
        if self._layers is not None and (not layer or int(layer[1]) not in self._layers):
            return False
        return not any(pattern.fullmatch(module) for _, pattern in self._excluded)


def _refuse_fields(config: JsonConfig) -> None:
    """Raise ValueError for a field that changes what the adapter means and is not applied."""
    for key, why in REFUSED_FIELDS.items():
        if config.values.get(key) not in HARMLESS_VALUES:
            value = short_repr(config.values[key])
            advice = "PEFT cannot merge it either: run it with PEFT" if key in NEVER_MERGED else MERGE_WITH_PEFT
            raise ValueError(f"{config.path}: field {key!r} is {value}: {why}; {advice}")
    start = config.values.get("init_lora_weights")
    if start not in KEEPS_BASE_WEIGHTS:
        raise ValueError(
            f"{config.path}: field 'init_lora_weights' is {short_repr(start)}: such a start also changes the base's "
            "weights; convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion), or "
            f"{MERGE_WITH_PEFT}"
        )
    unknown = {key for key, value in config.values.items() if value not in HARMLESS_VALUES}
    JsonConfig(config.path, dict.fromkeys(unknown)).refuse_unknown((*READ_FIELDS, *IGNORED_FIELDS))


def _module_names(config: JsonConfig, key: str) -> list[tuple[str, Expression]]:
    """(text, expression) for each entry of a field that holds a regular expression or a list of names."""
    value: Any = config.values.get(key)
    if value is None:
        return []
    if value == ALL_LINEAR:
        return [(ALL_LINEAR, Expression(f".*{LINEAR_SUFFIX}"))]
    if isinstance(value, str):
        return [(value, _compiled(config, key, value))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise config.error(key, "a regular expression or a list of names")
    return [(name, _compiled(config, key, rf"(?:.*\.)?{re.escape(name)}")) for name in value]


def _module_pattern(section: JsonConfig, key: str) -> Expression:
    """A key of rank_pattern or alpha_pattern: an expression for the end of a module's name, from a dot on."""
    return _compiled(section, key, rf"(?:.*\.)?(?:{key})")


def _compiled(config: JsonConfig, key: str, expression: str) -> Expression:
    try:
        return Expression(expression)
    except ValueError as error:
        what = f"expected a regular expression, got {short_repr(expression)}: {error}; name the modules instead"
        raise ValueError(f"{config.path}: field {short_repr(config.full_name(key))}: {what}") from error


def _layers(config: JsonConfig, n_layers: int) -> frozenset[int] | None:
    """The layers of layers_to_transform; None means all."""
    key = "layers_to_transform"
    layers = config.token_ids(key)  # also indices from 0: one or a list
    if any(layer >= n_layers for layer in layers):
        raise config.error(key, f"layers from 0 to {n_layers - 1}, those of the base")
    return frozenset(layers) if layers else None
