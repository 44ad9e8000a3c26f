"""The table of what compilers make of the kernels, in Markdown, as it stands in docs/compiled/."""

import re
from typing import Any

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.model_launches import CONTEXT_TOKENS, MODELS, PREFILL_TOKENS
from fastllama.benchmarks.kernels_report.table import EVERY_MODELS_GPUS, WHOLE_STEP, Row, launch_counts
from fastllama.benchmarks.tables import markdown as table

# Its sections, besides one for each GPU.
LAUNCHES = "Launches of a decode step"
WEIGHTS = "How weights are read on an H200"
TRAFFIC = "Bytes moved on an H200"
BARRIER = {None: "", True: "yes", False: "MISSING"}
STREAMING = ["model", "rows", "op", "weight", "programs / 132", "fit", "waves", "in flight, KB", "issue slots", "µs"]
STREAMING += ["x early", "chain, cycles", "prefetches"]
RESOURCES = ("programs", "warps", "stages", "registers", "spills", "shared", "resident")


def document(triton_version: str, compiled: list[Row], traffic: list[Row]) -> str:
    """The whole document, from rows of every GPU and of the traffic."""
    parts = [
        f"# The kernels, as triton {triton_version} compiles them",
        "Made by `make kernels-report` and held to by the tests. Every launch of a decode step at 1, 4 and 16 rows and "
        f"of the kernels around the library's matmul for a prompt's {PREFILL_TOKENS} tokens, in bfloat16; the launches "
        "are those of the real wrappers. 3-70B/8 is one rank of eight; 3.2-1B is compiled for "
        f"{', '.join(EVERY_MODELS_GPUS)} alone. No figure here was measured on a GPU.",
        f"## {LAUNCHES}",
        table(
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
        table(
            STREAMING,
            [_streaming(row) for row in compiled if "in_flight" in row],
        ),
        f"## {TRAFFIC}",
        "Counted in the interpreter from the kernels' own loads and stores: those of weights, embedding and cache, "
        "which come from memory, and all others, which L2 serves. The least is every operand once. Contexts of "
        f"{CONTEXT_TOKENS} tokens.",
        table(
            ["model", "rows", "op", "kernel", "least, KB", "weights and cache, KB", "the rest, KB"],
            [_moved(row) for row in traffic],
        ),
    ]
    for name in dict.fromkeys(row["gpu"] for row in compiled):
        parts += [
            f"## {heading(name)}",
            table(
                ["model", "tokens", "op", "kernel", *RESOURCES, "loads", "matrix", "barrier", "waits"],
                [_resources(row) for row in compiled if row["gpu"] == name and row["op"] != WHOLE_STEP],
            ),
        ]
    legend = (
        "Spills: bytes of a thread's stack. Shared: bytes of a program, limits "
        + ", ".join(f"{name} {gpu.shared_bytes}" for name, gpu in GPUS.items())
        + ". Resident: programs beside each other on a multiprocessor. Loads: bytes of a thread's loads by argument. "
        "Matrix: instructions. Barrier: before the atomic that hands over. Waits: of a dependent launch, for the "
        "kernels before it."
    )
    return "\n\n".join([*parts, "## Legend", legend]) + "\n"


def heading(gpu: str) -> str:
    """Of a GPU's section."""
    return f"{gpu} ({GPUS[gpu].title})"


def sections(document: str) -> dict[str, list[str]]:
    """A document's lines by the headings that they stand under, without the empty ones."""
    found: dict[str, list[str]] = {}
    lines = found.setdefault("", [])
    for line in filter(None, document.splitlines()):
        if line.startswith("## "):
            lines = found.setdefault(line.removeprefix("## "), [])
        else:
            lines.append(line)
    return found


def _resources(row: Row) -> list[Any]:
    loads = " · ".join(f"{name} {'/'.join(map(str, widths))}" for name, widths in sorted(row["loads"].items()))
    kernel = re.sub("^_|_kernel$", "", row["kernel"])
    return [
        row["model"],
        row["tokens"],
        row["op"],
        kernel,
        *(row[name] for name in RESOURCES),
        loads,
        row["matrix"],
        BARRIER[row["barrier"]],
        _waits(row),
    ]


def _waits(row: Row) -> str:
    if not row["dependent"]:
        return ""
    return "after prefetching " + ", ".join(row["prefetched"]) if row["prefetched"] else "first"


def _streaming(row: Row) -> list[Any]:
    return [
        row["model"],
        row["tokens"],
        row["op"],
        " × ".join(map(str, row["weight"])),
        f"{row['share']:.1f}",
        row["resident"],
        f"{row['share'] / row['resident']:.1f}",
        round(row["in_flight"] / 1024),
        "" if row["issue"] is None else f"{row['issue']:.0%}",
        f"{row['microseconds']:.1f}",
        _early(row),
        f"{row['chain']:.0f} of {row['budget']:.0f}" if "chain" in row else "",
        f"{row['prefetches']:.0f} in {row['prefetching']}",
    ]


def _early(row: Row) -> str:
    if "x_early" not in row:
        return ""
    norm = {True: ", norm", False: ", norm behind", None: ""}[row["norm_first"]]
    return f"{row['x_early']} of {row['x_loads']}{norm}"


def _moved(row: Row) -> list[Any]:
    sizes = [f"{row[name] / 1024:,.0f}" for name in ("least", "streamed", "rest")]
    return [row["model"], row["tokens"], row["op"], re.sub("^_|_kernel$", "", row["kernel"]), *sizes]
