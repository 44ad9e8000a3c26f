"""One run of the benchmarks: set up, measure case by case, keep what was measured whatever happens.

Results are written after every case, so that a run that is stopped or breaks down still leaves a complete file behind.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks import decode, generate, launch_times, memory, prefill
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.measure import (
    GIGA,
    TERA,
    Ceiling,
    ReadProbe,
    ResultFile,
    copy_ceiling,
    matmul_ceiling,
    write_result,
)
from fastllama.benchmarks.models import ModelSource, build
from fastllama.benchmarks.peers import Peer, PeerError, absence
from fastllama.benchmarks.reference_peer import refusal
from fastllama.benchmarks.rounds import (
    DEFAULT_ROUNDS,
    DEFAULT_STEPS,
    SUITES,
    Case,
    Ours,
    Runner,
    Suite,
    measure,
)
from fastllama.generation import Llama
from fastllama.model import Transformer
from fastllama.speed_of_light import Machine

DEFAULT_BATCHES = (1, 4)
DEFAULT_CONTEXTS = (32, 512)


@dataclass(frozen=True)
class Plan:
    """What to run: every batch with every context, of every suite, on one model."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None
    suites: Sequence[Suite] = ("decode",)
    batches: Sequence[int] = DEFAULT_BATCHES
    contexts: Sequence[int] = DEFAULT_CONTEXTS
    steps: int = DEFAULT_STEPS
    rounds: int = DEFAULT_ROUNDS
    peers: Sequence[str] = ()

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                raise ValueError(f"unknown suite {suite!r}: expected one of {', '.join(SUITES)}")

    @property
    def cases(self) -> list[Case]:
        cases = [
            Case(suite, batch, context, 1 if suite == "prefill" else self.steps, self.rounds)
            for suite in self.suites
            for context in self.contexts
            for batch in self.batches
        ]
        # Loading is the same for all but the size of the cache.
        largest = max(self.batches), max(self.contexts)
        return [case for case in cases if case.suite != "load" or (case.batch, case.context) == largest]

    def args(self) -> ModelArgs:
        """The model's arguments, with a cache just large enough."""
        return self.source.args(max(self.batches), max(self.contexts) + self.steps)


def run(plan: Plan, progress: Callable[[str], None], output: str | Path | None = None) -> ResultFile:
    """Measure `plan`; `output` is the result file, kept up to date. Ctrl-C ends early: the result says `interrupted`.

    ValueError or OSError for a plan that cannot begin, before anything is measured.
    """
    args = plan.args()
    result = ResultFile(describe_environment(plan.device), {})
    if output is not None:
        write_result(result, output)  # a path that cannot be written should not be found out at the end
    try:
        progress("measuring the machine")
        probe = ReadProbe(plan.device)
        fixed = {"copy": copy_ceiling(plan.device), "matmul": matmul_ceiling(plan.device, plan.dtype)}
        progress(f"loading {plan.source.name}")
        llm = build(plan.source, args, plan.device, plan.dtype, plan.backend)
        with _peers(plan, args, progress) as peers:
            for case in plan.cases:
                if case.suite in ("load", "memory"):
                    record = _started(plan, case, fixed["copy"], progress)
                else:
                    record = _measured(plan, case, llm, peers, probe, fixed["matmul"], progress)
                ceilings: dict[str, Ceiling] = {"read": probe.ceiling(), **fixed}
                result = replace(result, ceilings=ceilings, records=[*result.records, record])
                if output is not None:
                    write_result(result, output)
    except KeyboardInterrupt:
        result = replace(result, interrupted=True)
        if output is not None:
            write_result(result, output)
    return result


def _started(plan: Plan, case: Case, copy: Ceiling, progress: Callable[[str], None]) -> dict[str, Any]:
    """One record of the load or the memory suite, ready for JSON."""
    progress(f"{case.suite} {plan.source.name} {case.label}")
    dtype = str(plan.dtype).removeprefix("torch.")
    record = asdict(case) | {"model": plan.source.name, "dtype": dtype}
    how = {"device": str(plan.device), "dtype": dtype, "backend": plan.backend}
    if case.suite == "load":
        return record | memory.load_record(case, plan.source, how, copy)
    return record | memory.memory_record(case, plan.source, how)


def _measured(
    plan: Plan,
    case: Case,
    llm: Llama,
    peers: dict[str, Runner | str],
    probe: ReadProbe,
    matmul: Ceiling,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One case's record, ready for JSON."""
    args = llm.model.params

    def say(text: str) -> None:
        progress(f"{case.suite} {plan.source.name} {case.label}: {text}")

    measured = measure(case, args.vocab_size, Ours(llm), peers, probe, plan.dtype, say)
    record = asdict(case) | {"model": plan.source.name, "dtype": str(plan.dtype).removeprefix("torch.")}
    if case.suite == "decode":
        record |= decode.record(case, measured, args, plan.dtype)
        say("launch by launch")
        record["launches"] = _launches(llm.model, case, probe, matmul)
        return record
    of_suite = prefill.record if case.suite == "prefill" else generate.record
    return record | of_suite(case, measured, args, plan.dtype, matmul)


def _launches(model: Transformer, case: Case, probe: ReadProbe, matmul: Ceiling) -> list[dict[str, Any]]:
    """The launches of a step at half of the case's steps, beside the least that they could take."""
    before = probe.sample().p50
    times = launch_times.launch_times(model, case.batch, case.context + case.steps // 2)
    # The higher neighbour, as in the rounds: shares are not flattered.
    machine = Machine(read=max(before, probe.sample().p50) * GIGA, matmul=matmul.value * TERA)
    return [one.against(machine) for one in times]


@contextlib.contextmanager
def _peers(plan: Plan, args: ModelArgs, progress: Callable[[str], None]) -> Iterator[dict[str, Runner | str]]:
    """The plan's peers by name, running, or the reason why one is not."""
    peers: dict[str, Runner | str] = {}
    with contextlib.ExitStack() as stack:
        for name in plan.peers:
            reason = absence(name) or (refusal(args) if name == "reference" else None)
            if reason is not None:
                peers[name] = reason
                continue
            progress(f"starting {name}")
            try:
                peers[name] = stack.enter_context(
                    Peer(
                        name,
                        plan.source,
                        device=plan.device,
                        dtype=plan.dtype,
                        max_batch_size=args.max_batch_size,
                        max_seq_len=args.max_seq_len,
                    )
                )
            except PeerError as error:
                peers[name] = str(error)
        yield peers


def report(result: ResultFile) -> str:
    """A result for people: what it was measured on, the table, and how to read it."""
    environment = result.environment
    lines = [
        f"{environment.device_name}, {environment.threads} threads, torch {environment.torch}",
        *(_describe(ceiling) for ceiling in result.ceilings.values()),
    ]
    for suite in dict.fromkeys(record["suite"] for record in result.records):
        lines += ["", *_section(suite, [record for record in result.records if record["suite"] == suite])]
    if result.interrupted:
        lines.append("interrupted: only finished cases are shown")
    return "\n".join(lines)


def _section(suite: str, records: Sequence[dict[str, Any]]) -> list[str]:
    first = records[0]
    how = f"{first['model']} in {first['dtype']}, {first['rounds']} rounds"
    if suite == "prefill":
        return [f"prefill of {how}", prefill.table(records)]
    if suite == "load":
        return [f"load {first['model']} as {first['dtype']}, {first['rounds']} rounds", memory.load_table(records)]
    if suite == "memory":
        return [f"memory of {first['model']} in {first['dtype']}, MiB", memory.memory_table(records)]
    if suite == "generate":
        return [f"generate on {how}: ragged prompts, {first['steps']} greedy tokens each", generate.table(records)]
    lines = [f"decode of {how}, {first['steps']} greedy tokens", decode.table(records)]
    if all("launches" in record for record in records):
        lines += [
            "",
            "a step launch by launch: how many, µs of one, % of the speed of light",
            launch_times.table(records),
        ]
    return lines


def _describe(ceiling: Ceiling) -> str:
    samples = ceiling.samples
    digits = 1 if samples.p50 >= 10 else 3
    low, high, best = (f"{value:.{digits}f}" for value in (samples.p10, samples.p90, samples.maximum))
    value = f"{samples.p50:.{digits}f} {ceiling.unit}"
    return f"{ceiling.name:6} {value} (p10 {low}, p90 {high}, best {best}; {ceiling.method})"
