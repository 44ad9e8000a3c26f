"""The document of docs/compiled/: what the compiler makes of the kernels, in Markdown."""

import re
from operator import itemgetter

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.model_launches import CONTEXT_TOKENS, MODELS, PREFILL_TOKENS
from fastllama.benchmarks.kernels_report.table import ALL_MODELS_GPUS, WHOLE_STEP, Row, launch_counts
from fastllama.benchmarks.tables import Columns, markdown, table_of

# The titles of the sections that are not about one GPU.
LAUNCHES = "Launches of a decode step"
WEIGHTS = "How weights are read on an H200"
TRAFFIC = "Bytes moved on an H200"
BARRIER = {None: "", True: "yes", False: "MISSING"}


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


RESOURCES: Columns = {
    **{name: itemgetter(name) for name in ("model", "tokens", "op")},
    "kernel": _kernel,
    **{name: itemgetter(name) for name in ("programs", "warps", "stages", "registers", "spills", "shared", "resident")},
    "loads": _loads,
    "matrix": itemgetter("matrix"),
    "barrier": lambda row: BARRIER[row["barrier"]],
    "waits": _waits,
}
CASE: Columns = {"model": itemgetter("model"), "rows": itemgetter("tokens"), "op": itemgetter("op")}
STREAMING: Columns = {
    **CASE,
    "weight": lambda row: " × ".join(map(str, row["weight"])),
    "programs / 132": "{share:.1f}".format_map,
    "fit": itemgetter("resident"),
    "waves": lambda row: f"{row['share'] / row['resident']:.1f}",
    "in flight, KB": lambda row: round(row["in_flight"] / 1024),
    "issue slots": lambda row: "" if row["issue"] is None else f"{row['issue']:.0%}",
    "µs": "{microseconds:.1f}".format_map,
    "x early": _early,
    "chain, cycles": lambda row: f"{row['chain']:.0f} of {row['budget']:.0f}" if "chain" in row else "",
    "prefetches": "{prefetches:.0f} in {prefetching}".format_map,
}
MOVED: Columns = {
    **CASE,
    "kernel": _kernel,
    "least, KB": lambda row: f"{row['least'] / 1024:,.0f}",
    "weights and cache, KB": lambda row: f"{row['streamed'] / 1024:,.0f}",
    "the rest, KB": lambda row: f"{row['rest'] / 1024:,.0f}",
}


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
        table_of([row for row in compiled if "in_flight" in row], STREAMING).text(in_markdown=True),
        f"## {TRAFFIC}",
        "Counted in the interpreter from the kernels' own loads and stores: those of weights, embedding and cache, "
        "which come from memory, and all others, which L2 serves. The least is every operand once. Contexts of "
        f"{CONTEXT_TOKENS} tokens.",
        table_of(traffic, MOVED).text(in_markdown=True),
    ]
    for name in dict.fromkeys(row["gpu"] for row in compiled):
        rows = [row for row in compiled if row["gpu"] == name and row["op"] != WHOLE_STEP]
        parts += [f"## {heading(name)}", table_of(rows, RESOURCES).text(in_markdown=True)]
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
