"""What `fastllama inspect` says of the memory at every precision: which GPUs hold the model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastllama.args import ModelArgs
    from fastllama.memory_plan import MemoryPlan

SHOWN = (None, "int8", "int4")  # fp8 needs as much as int8
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNIT_FACTOR = 1024


def precision_plans(
    args: "ModelArgs", dtype: "torch.dtype", plan_of: Callable[[int, str | None], "MemoryPlan"]
) -> list[dict[str, Any]]:
    """For each precision the bytes of weights and of everything, and the GPUs that hold it alone; or what prevents it.

    plan_of: the memory plan for a number of processes and a choice of `quantize`.
    """
    from fastllama.speed_of_light import DATA_SHEETS

    found: list[dict[str, Any]] = []
    for choice in SHOWN:
        name = str(dtype).removeprefix("torch.") if choice is None else choice
        try:
            plan = plan_of(1, choice)
        except ValueError as error:
            found.append({"precision": name, "obstacle": str(error)})
            continue
        gpus = [gpu for gpu, sheet in DATA_SHEETS.items() if plan.total <= sheet.memory]
        found.append({"precision": name, "weights": plan.weights, "total": plan.total, "gpus": gpus})
    return found


def precisions_section(plans: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """The title and the lines of the section."""
    return "weights, all memory, and the GPUs that hold it, by --quantize", [
        (plan["precision"], plan.get("obstacle") or _plan_text(plan)) for plan in plans
    ]


def _plan_text(plan: dict[str, Any]) -> str:
    return f"{size_text(plan['weights']):>10}  {size_text(plan['total']):>10}  {', '.join(plan['gpus']) or 'none'}"


def size_text(count: int) -> str:
    """A number of bytes as text: 1536 -> "1.5 KiB"."""
    size, unit = float(count), 0
    while size >= UNIT_FACTOR and unit < len(UNITS) - 1:
        size, unit = size / UNIT_FACTOR, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{count} B"
