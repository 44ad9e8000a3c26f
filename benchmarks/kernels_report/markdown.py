"""The document of docs/compiled/: what the compiler makes of the kernels, in Markdown."""

import re
from collections.abc import Callable, Iterable, Mapping

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.model_launches import CONTEXT_TOKENS, MODELS, PREFILL_TOKENS
from fastllama.benchmarks.kernels_report.table import ALL_MODELS_GPUS, WHOLE_STEP, Row, launch_counts
from fastllama.benchmarks.tables import markdown

# The titles of the sections that are not about one GPU.
LAUNCHES = "Launches of a decode step"
WEIGHTS = "How weights are read on an H200"
TRAFFIC = "Bytes moved on an H200"
BARRIER = {None: "", True: "yes", False: "MISSING"}

Cell = str | Callable[[Row], object]  # a template for str.format, or a function of the row


def _kernel(row: Row) -> str:
    return re.sub("^_|_kernel$", "", row["kernel"])


def _loads(row: Row) -> str:
    return " · ".join(f"{name} {'/'.join(map(str, widths))}" for name, widths in sorted(row["loads"].items()))


def _waits(row: Row) -> str:
    if not row["dependent"]:
        return ""
    return "after prefetching " + ", ".join(row["prefetched"]) if row["prefetched"] else "first"


def _early(row: Row) -> str:
    if "x_early" not in row:
        return ""
    norm = {True: ", norm", False: ", norm behind", None: ""}[row["norm_first"]]
    return f"{row['x_early']} of {row['x_loads']}{norm}"


RESOURCES: Mapping[str, Cell] = {
    **{name: f"{{{name}}}" for name in ("model", "tokens", "op")},
    "kernel": _kernel,
    **{name: f"{{{name}}}" for name in ("programs", "warps", "stages", "registers", "spills", "shared", "resident")},
    "loads": _loads,
    "matrix": "{matrix}",
    "barrier": lambda row: BARRIER[row["barrier"]],
    "waits": _waits,
}
STREAMING: Mapping[str, Cell] = {
    "model": "{model}",
    "rows": "{tokens}",
    "op": "{op}",
    "weight": lambda row: " × ".join(map(str, row["weight"])),
    "programs / 132": "{share:.1f}",
    "fit": "{resident}",
    "waves": lambda row: f"{row['share'] / row['resident']:.1f}",
    "in flight, KB": lambda row: round(row["in_flight"] / 1024),
    "issue slots": lambda row: "" if row["issue"] is None else f"{row['issue']:.0%}",
    "µs": "{microseconds:.1f}",
    "x early": _early,
    "chain, cycles": lambda row: f"{row['chain']:.0f} of {row['budget']:.0f}" if "chain" in row else "",
    "prefetches": "{prefetches:.0f} in {prefetching}",
}
MOVED: Mapping[str, Cell] = {
    "model": "{model}",
    "rows": "{tokens}",
    "op": "{op}",
    "kernel": _kernel,
    "least, KB": lambda row: f"{row['least'] / 1024:,.0f}",
    "weights and cache, KB": lambda row: f"{row['streamed'] / 1024:,.0f}",
    "the rest, KB": lambda row: f"{row['rest'] / 1024:,.0f}",
}


def _table(columns: Mapping[str, Cell], rows: Iterable[Row]) -> str:
    cells = columns.values()
    texts = ([cell.format(**row) if isinstance(cell, str) else cell(row) for cell in cells] for row in rows)
    return markdown(list(columns), texts)


def document(triton_version: str, compiled: list[Row], traffic: list[Row]) -> str:
    """The document, from the rows of every GPU and of the traffic."""
    parts = [
        f"# The kernels, as triton {triton_version} compiles them",
        "Made by `make kernels-report` and held to by the tests. Every launch of a decode step at 1, 4 and 16 rows and "
        f"of the kernels around the library's matmul for a prompt's {PREFILL_TOKENS} tokens, in bfloat16; the launches "
        "are those of the real wrappers. 3-70B/8 is one rank of eight; 3.2-1B is compiled for "
        f"{', '.join(ALL_MODELS_GPUS)} alone. No figure here was measured on a GPU.",
        f"## {LAUNCHES}",
        markdown(
            ["GPU", "model", "rows", "a layer", "a step", "layers"],
            [
                [gpu, model, tokens, layer, step, MODELS[model].n_layers]
                for (gpu, model, tokens), (layer, step) in launch_counts(compiled).items()
            ],
        ),
        "Torch launches no kernel of its own between them.",
        f"## {WEIGHTS}",
        "In flight: what the programs that fit beside each other on a multiprocessor have asked for before they wait; "
        "part of it, where there are fewer programs than fit. Waves: how often all multiprocessors fill up. Issue "
        "slots: the share of all that the instructions take if the weight is read at 4.5 TB/s, in µs. x early: its "
        "loads that are requested before any weight is waited for, and whether the norm is known by then. Chain: "
        "cycles that a stage's matrix instructions take at the least, since each waits for the sums of the one before, "
        "of those in which the stage has to be read. Prefetches: instructions that a warp issues one after the other, "
        "and in how many programs.",
        _table(STREAMING, (row for row in compiled if "in_flight" in row)),
        f"## {TRAFFIC}",
        "Counted in the interpreter from the kernels' own loads and stores: those of weights, embedding and cache, "
        "which come from memory, and all others, which L2 serves. The least is every operand once. Contexts of "
        f"{CONTEXT_TOKENS} tokens.",
        _table(MOVED, traffic),
    ]
    for name in dict.fromkeys(row["gpu"] for row in compiled):
        rows = [row for row in compiled if row["gpu"] == name and row["op"] != WHOLE_STEP]
        parts += [f"## {heading(name)}", _table(RESOURCES, rows)]
    legend = (
        "Spills: bytes of a thread's stack. Shared: bytes of a program, limits "
        + ", ".join(f"{name} {gpu.shared_bytes}" for name, gpu in GPUS.items())
        + ". Resident: programs beside each other on a multiprocessor. Loads: bytes of a thread's loads by argument. "
        "Matrix: instructions. Barrier: before the atomic that hands over. Waits: of a dependent launch, for the "
        "kernels before it."
    )
    return "\n\n".join([*parts, "## Legend", legend]) + "\n"


def heading(gpu: str) -> str:
    """The title of a GPU's section."""
    return f"{gpu} ({GPUS[gpu].title})"


def sections(document: str) -> dict[str, list[str]]:
    """A document's lines by section title, without empty lines."""
    found: dict[str, list[str]] = {}
    lines = found.setdefault("", [])
    for line in filter(None, document.splitlines()):
        if line.startswith("## "):
            lines = found.setdefault(line.removeprefix("## "), [])
        else:
            lines.append(line)
    return found
