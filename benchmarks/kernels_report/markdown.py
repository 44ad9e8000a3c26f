"""The document of docs/compiled/: what the compiler makes of the kernels, in Markdown."""

import re
from operator import itemgetter

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.model_launches import CONTEXT_TOKENS, MODELS, PREFILL_TOKENS
from fastllama.benchmarks.kernels_report.table import ALL_MODELS_GPUS, CHECKED_STEP, WHOLE_STEPS, Row, launch_counts
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
    norm = {True: ", norm", False: ", norm late", None: ""}[row["norm_first"]]
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
        "`make kernels-report` writes this page, and the tests compare the kernels with it. It lists every launch of a "
        f"decode step with 1, 4 and 16 rows, and every launch around the library's matmul for {PREFILL_TOKENS} tokens "
        "of a prompt, in bfloat16, made by the real wrappers. Of a step that checks guesses, it lists the launches "
        "that differ, with 5 and 16 tokens of one row, and attention of 3 rows of 5. 3-70B/8 is one of eight "
        f"processes. 3.2-1B is compiled for {', '.join(ALL_MODELS_GPUS)} only. No figure on this page was measured on "
        "a GPU.",
        f"## {LAUNCHES}",
        markdown(
            ["GPU", "model", "rows", "a layer", "a step", "layers"],
            [
                [gpu, model, tokens, layer, step, MODELS[model].n_layers]
                for (gpu, model, tokens), (layer, step) in launch_counts(compiled).items()
            ],
        ),
        "There is no kernel of torch's between them. A step that checks looked-up guesses of one row:",
        markdown(
            ["GPU", "model", "guesses", "a step", "layers"],
            [
                [row["gpu"], row["model"], row["tokens"] - 1, row["launches"], MODELS[row["model"]].n_layers]
                for row in compiled
                if row["op"] == CHECKED_STEP
            ],
        ),
        f"## {WEIGHTS}",
        "Fit: programs that run at once on a multiprocessor. Waves: how often the programs fill all multiprocessors. "
        "In flight: bytes of the weight that those programs have requested before they wait. Issue slots: the share "
        "of them that the instructions take if the weight is read at 4.5 TB/s, which takes the time in the µs column."
        " x early: loads of x that are requested before the first wait for a weight, and whether the norm is computed"
        " by then. Chain: the least cycles of a stage's matrix instructions, which wait for each other's sums, and "
        "the cycles in which the stage must be read. Prefetches: instructions of one warp, and the number of programs"
        " that prefetch.",
        table_of([row for row in compiled if "in_flight" in row], STREAMING).text(in_markdown=True),
        f"## {TRAFFIC}",
        "Counted in the interpreter from the loads and stores of the kernels. Weights, embedding and cache come from "
        f"memory, the rest from L2. Least: every operand once. The context is {CONTEXT_TOKENS} tokens.",
        table_of(traffic, MOVED).text(in_markdown=True),
    ]
    for name in dict.fromkeys(row["gpu"] for row in compiled):
        rows = [row for row in compiled if row["gpu"] == name and row["op"] not in WHOLE_STEPS]
        parts += [f"## {heading(name)}", table_of(rows, RESOURCES).text(in_markdown=True)]
    legend = (
        "Spills: bytes of a thread's stack. Shared: bytes of shared memory of a program; the limits are "
        + ", ".join(f"{name} {gpu.shared_bytes}" for name, gpu in GPUS.items())
        + ". Resident: programs that run at once on a multiprocessor. Loads: bytes of a thread's loads, by argument. "
        "Matrix: the number of matrix instructions. Barrier: whether there is one before the atomic that signals "
        "partial results. Waits: when a dependent launch waits for the kernels before it."
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
