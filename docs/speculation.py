"""`python -m docs.speculation`: computes the tables of "Limits of speculation" in docs/performance-notes.md."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import PUBLISHED_MODELS
from fastllama.quantization import model_schemes
from fastllama.speculation_limits import Setting, SharedModel, best_limits, speculation_limits
from fastllama.speed_of_light import DATA_SHEETS

GPU = "H200"
DTYPE = torch.bfloat16
CONTEXT = 1024
ACCEPTANCE = 0.7
N_GUESSES = 4
MODELS = {"3.2-1B": "llama3.2-1b", "3.1-8B": "llama3.1-8b", "3.1-70B": "llama3-70b"}  # shapes, by their names here
# (target, its precision, draft or None, its precision, GPUs)
CASES: list[tuple[str, str | None, str | None, str | None, int]] = [
    ("3.1-8B", None, None, None, 1),
    ("3.1-8B", None, "3.2-1B", None, 1),
    ("3.1-70B", "int8", None, None, 1),
    ("3.1-70B", "int8", "3.1-8B", None, 1),
    ("3.1-70B", "int8", "3.1-8B", "int8", 1),
    ("3.1-70B", "int8", "3.2-1B", None, 1),
    *(("3.1-70B", None, draft, None, n) for n in (2, 4, 8) for draft in (None, "3.1-8B", "3.2-1B")),
]
SHARES = (0.3, 0.5, 0.7, 0.9)
HEAD = (
    *("target", "GPUs", "guesses of", "plain tokens/s", "checking 4", "guessing 4"),
    *("tokens/s with 4", "speed-up", "best number", "tokens/s with it"),
)
# (target, its precision, draft, its precision) of the second table's columns, beside that of lookup
DRAFTED: list[tuple[str, str | None, str, str | None]] = [
    ("3.1-8B", None, "3.2-1B", None),
    ("3.1-70B", "int8", "3.1-8B", "int8"),
    ("3.1-70B", "int8", "3.2-1B", None),
]


def model(name: str, quantize: str | None = None, n_processes: int = 1) -> SharedModel:
    """A published model of MODELS, shared by some processes, for one row."""
    args = ModelArgs(**PUBLISHED_MODELS[MODELS[name]], max_batch_size=1, max_seq_len=2 * CONTEXT)
    return SharedModel(args, DTYPE, model_schemes(quantize, args.split(n_processes)), n_processes)


def setting(launch_gap: float | None = None) -> Setting:
    """One row on GPU. launch_gap: in seconds; None for the assumed one."""
    known = {} if launch_gap is None else {"launch_gap": launch_gap}
    return Setting(DATA_SHEETS[GPU], batch=1, context=CONTEXT, **known)


def case_rows() -> Iterator[list[str]]:
    """The rows of the first table, without its head: each case at ACCEPTANCE."""
    for name, quantize, draft_name, draft_quantize, n_processes in CASES:
        target = model(name, quantize, n_processes)
        draft = model(draft_name, draft_quantize, n_processes) if draft_name else None
        limits = speculation_limits(target, draft, setting(), N_GUESSES, ACCEPTANCE)
        best = best_limits(target, draft, setting(), ACCEPTANCE)
        yield [
            _name(name, quantize),
            str(n_processes),
            _name(draft_name, draft_quantize) if draft_name else "lookup",
            f"{limits.plain_rate:.0f}",
            f"{limits.checking_cost:.3f}",
            f"{limits.guessing / limits.plain:.3f}",
            f"{limits.rate:.0f}",
            f"{limits.speed_up:.2f}",
            str(best.n_guesses),
            f"{best.rate:.0f}",
        ]


def share_rows() -> Iterator[list[str]]:
    """The rows of the second table, without its head: speed-ups, and in brackets the number of guesses."""
    target = model("3.1-8B")
    for share in SHARES:
        looked_up = speculation_limits(target, None, setting(), N_GUESSES, share)
        cells = [f"{share:.0%}", f"{looked_up.tokens_per_step:.2f}", f"{looked_up.speed_up:.2f}"]
        for name, quantize, draft, draft_quantize in DRAFTED:
            best = best_limits(model(name, quantize), model(draft, draft_quantize), setting(), share)
            cells.append(f"{best.speed_up:.2f} ({best.n_guesses})")
        yield cells


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, rows)])


def tables() -> list[str]:
    """Both tables."""
    drafted = [f"{_name(*case[:2])} with {_name(*case[2:])}" for case in DRAFTED]
    head = ("right guesses", f"tokens a step with {N_GUESSES}", f"8B with lookup, {N_GUESSES} guesses", *drafted)
    return [table(HEAD, case_rows()), table(head, share_rows())]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(model_name: str, quantize: str | None) -> str:
    return f"{model_name} in {quantize}" if quantize else model_name


if __name__ == "__main__":
    print("\n\n".join(tables()))
