"""What `fastllama inspect` plans: memory at every precision; memory, speed and speculation on several processes."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from fastllama.args import ModelArgs
    from fastllama.memory_plan import MemoryPlan
    from fastllama.quantization import Scheme

AS_STORED = "as stored"  # weights that are quantised in the files, and stay so
SHOWN = (None, "int8", "int4")  # fp8 needs as much as int8
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNIT_FACTOR = 1024
PLANNED_GUESSES = 4  # of a row, which a step checks
PLANNED_ACCEPTANCE = (0.3, 0.5, 0.7, 0.9)  # shares of guesses that are right


def precision_plans(kept: str, plan_of: Callable[[int, str | None], "MemoryPlan"]) -> list[dict[str, Any]]:
    """For each precision the bytes of weights and of everything, and the GPUs that hold it alone; or what prevents it.

    kept: what the weights are without --quantize. plan_of: the memory plan for a number of processes and a choice of
    `quantize`.
    """
    from fastllama.speed_of_light import DATA_SHEETS

    found: list[dict[str, Any]] = []
    for choice in SHOWN:
        name = choice or kept
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
        (plan["precision"], plan.get("obstacle") or _precision_text(plan)) for plan in plans
    ]


def _precision_text(plan: dict[str, Any]) -> str:
    return f"{size_text(plan['weights']):>10}  {size_text(plan['total']):>10}  {', '.join(plan['gpus']) or 'none'}"


class Planner(NamedTuple):
    """What a plan for several processes needs."""

    args: "ModelArgs"
    dtype: "torch.dtype"
    gpu: str
    plan_of: Callable[[int], "MemoryPlan"]
    schemes_of: Callable[[int], "Mapping[str, Scheme]"]
    tokens_in: Callable[[int, int], int]  # the cache tokens that fit in so many bytes on each of so many GPUs


def process_plan(planner: Planner, n_processes: int) -> dict[str, Any]:
    """Memory of each of `n_processes`, their limit of tokens per second, and the tokens that fit in the cache.

    Or why such a split is impossible.
    """
    from fastllama.speed_of_light import (
        COLLECTIVE_LATENCY_S,
        DATA_SHEETS,
        Links,
        collectives_seconds,
        decode_step,
        least_seconds,
    )

    args, dtype, gpu = planner.args, planner.dtype, planner.gpu
    obstacles = args.obstacles(n_processes)
    try:
        plan = None if obstacles else planner.plan_of(n_processes)
    except ValueError as error:  # groups of columns that cannot be divided so
        plan, obstacles = None, [str(error)]
    if plan is None:
        return {"n": n_processes, "obstacles": obstacles}
    batch, context = args.max_batch_size, args.max_seq_len / 2  # the average length while a row fills its cache
    sheet = DATA_SHEETS[gpu]
    links = Links(sheet.link_bandwidth, COLLECTIVE_LATENCY_S)
    exchanging = collectives_seconds(args, dtype, batch, n_processes, links)
    step = decode_step(args.split(n_processes), dtype, batch, context, planner.schemes_of(n_processes))
    seconds = least_seconds(step, sheet.machine) + exchanging
    return {
        "n": n_processes,
        "bytes_each": plan.total,
        "fits": plan.total <= sheet.memory,
        "most_tokens_per_second": batch / seconds,
        "share_of_exchanging": exchanging / seconds,
        "cache_tokens": planner.tokens_in(int(sheet.memory), n_processes),
        "speculation": _speculation_plan(planner, n_processes, batch, context),
    }


def _speculation_plan(planner: Planner, n_processes: int, batch: int, context: float) -> dict[str, Any] | None:
    """What guesses by lookup cost and gain at most; None for too many rows.

    "checking_cost" is in plain steps, and "speed_up" has one factor for each of PLANNED_ACCEPTANCE.
    """
    from fastllama.speculation_limits import Setting, SharedModel, most_guesses, speculation_limits
    from fastllama.speed_of_light import DATA_SHEETS

    n_guesses = min(PLANNED_GUESSES, most_guesses(batch))
    if n_guesses == 0:
        return None
    target = SharedModel(planner.args, planner.dtype, planner.schemes_of(n_processes), n_processes)
    setting = Setting(DATA_SHEETS[planner.gpu], batch, context)
    found = [speculation_limits(target, None, setting, n_guesses, acceptance) for acceptance in PLANNED_ACCEPTANCE]
    return {
        "guesses": n_guesses,
        "checking_cost": found[0].checking_cost,
        "acceptance": list(PLANNED_ACCEPTANCE),
        "speed_up": [limits.speed_up for limits in found],
    }


def process_plan_text(plan: dict[str, Any]) -> str:
    """The result of `process_plan` as text."""
    if "obstacles" in plan:
        return "not possible: " + "; ".join(plan["obstacles"])
    rate, share = plan["most_tokens_per_second"], plan["share_of_exchanging"]
    misfit = "" if plan["fits"] else "  does not fit"
    return f"{size_text(plan['bytes_each']):>10}  {rate:8.0f}  {share:4.0%}  {plan['cache_tokens']:12,}{misfit}"


def speculation_section(gpu: str, plans: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The title and the lines of the section, or nothing where there are too many rows to check guesses."""
    found = [(str(plan["n"]), plan["speculation"]) for plan in plans if plan.get("speculation")]
    if not found:
        return []
    n_guesses, shares = found[0][1]["guesses"], ", ".join(f"{share:.0%}" for share in PLANNED_ACCEPTANCE)
    title = f"on several {gpu}, {n_guesses} guesses by lookup: cost of a step, speed-up if {shares} are right"
    return [(title, [(n, _speculation_text(plan)) for n, plan in found])]


def _speculation_text(plan: dict[str, Any]) -> str:
    return "  ".join([f"{plan['checking_cost']:10.3f}", *(f"{factor:5.2f}" for factor in plan["speed_up"])])


def machine_section(machine: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The title and the lines of the section about this machine."""
    texts: dict[str, Callable[[int], str]] = {"free_memory": size_text, "cache_tokens": "{:,} fit".format}
    return "on this machine", [
        (name.replace("_", " "), texts.get(name, str)(value)) for name, value in machine.items() if value is not None
    ]


def size_text(count: int) -> str:
    """A number of bytes as text: 1536 -> "1.5 KiB"."""
    size, unit = float(count), 0
    while size >= UNIT_FACTOR and unit < len(UNITS) - 1:
        size, unit = size / UNIT_FACTOR, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{count} B"
