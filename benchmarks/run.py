"""One run of the benchmarks: set up, measure case by case, keep what was measured whatever happens.

Results are written after every case, so that a run that is stopped or breaks down still leaves a complete file behind.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.ceilings import Ceiling, MatmulProbe, ReadProbe, copy_ceiling
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.models import ModelSource, build, described
from fastllama.benchmarks.peers.client import PEERS, Peer, PeerError, running
from fastllama.benchmarks.result_file import FAILED, ResultFile, write_result
from fastllama.benchmarks.runner import Ours, Runner
from fastllama.benchmarks.statistics import GIGA, TERA
from fastllama.benchmarks.suites import decode, generate, kernels, load_and_memory, prefill, step_launches
from fastllama.benchmarks.suites.comparison import DEFAULT_ROUNDS, DEFAULT_STEPS, SUITES, Case, Suite, measure
from fastllama.benchmarks.suites.op_cases import ops_of
from fastllama.distributed import driver, environment
from fastllama.generation import Llama
from fastllama.kernels import select
from fastllama.speed_of_light import Machine

DEFAULT_BATCHES = (1, 4)
DEFAULT_CONTEXTS = (32, 512)
WITH_MODEL = ("decode", "prefill", "generate")  # the suites that run ours and peers in turns
FRESH = ("load", "memory")  # those that build a model in a process of its own

Record = dict[str, Any]


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
    gpt_fast: str | None = None  # the folder of its code
    nproc: int = 1  # processes that share our model, one on each GPU; a peer's is in one

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                raise ValueError(f"unknown suite {suite!r}: expected one of {', '.join(SUITES)}")
        if self.nproc > 1 and "kernels" in self.suites:
            raise ValueError("the kernels suite measures the launches of one process: leave it out, or nproc")

    def cases(self, suites: Sequence[str]) -> list[Case]:
        """Those of the plan's suites that are among `suites`."""
        cases = [
            Case(suite, batch, context, 1 if suite == "prefill" else self.steps, self.rounds)
            for suite in self.suites
            if suite in suites
            for context in self.contexts
            for batch in self.batches
        ]
        # Loading is the same for all but the size of the cache.
        largest = max(self.batches), max(self.contexts)
        return [case for case in cases if case.suite != "load" or (case.batch, case.context) == largest]

    @property
    def args(self) -> ModelArgs:
        """The model's arguments, with a cache just large enough."""
        return self.source.args(max(self.batches), max(self.contexts) + self.steps)

    @property
    def backend_name(self) -> str:
        """The backend that runs. ValueError for one that cannot."""
        return select.backend(self.backend, self.device).__name__.rpartition(".")[2]

    def record_of(self, case: Case) -> Record:
        """What every record of a case begins with."""
        how = {"dtype": _name(self.dtype), "backend": self.backend_name, "nproc": self.nproc}
        return asdict(case) | {"model": self.source.name} | how


class _Ground:
    """The machine's ceilings: one measured once, and those that are sampled again beside every figure."""

    def __init__(self, plan: Plan) -> None:
        self.probe = ReadProbe(plan.device)
        self.copy = copy_ceiling(plan.device)
        self.matmul = MatmulProbe(plan.device, plan.dtype)

    def ceilings(self) -> dict[str, Ceiling]:
        return {"read": self.probe.ceiling(), "copy": self.copy, "matmul": self.matmul.ceiling()}


def run(plan: Plan, progress: Callable[[str], None], output: str | Path | None = None) -> ResultFile:
    """Measure `plan`; `output` is the result file, kept up to date. Ctrl-C ends early: the result says `interrupted`.

    ValueError or OSError for a plan that cannot begin, before anything is measured.
    """
    args = plan.args
    _ = plan.backend_name  # one that cannot run should not be found out later
    args.split(plan.nproc)
    result = ResultFile(describe_environment(plan.device), {})
    if output is not None:
        write_result(result, output)  # a path that cannot be written should not be found out at the end
    try:
        progress("measuring the machine")
        ground = _Ground(plan)
        for record in _records(plan, args, ground, progress):
            result = replace(result, ceilings=ground.ceilings(), records=[*result.records, record])
            if output is not None:
                write_result(result, output)
    except KeyboardInterrupt:
        result = replace(result, interrupted=True)
        if output is not None:
            write_result(result, output)
    return result


def failures(result: ResultFile) -> list[str]:
    """Everything in a result that went wrong, a line each: outputs that disagree, peers that broke down."""
    found = []
    for record in result.records:
        if record.get("status") in FAILED:
            found.append(f"{record['suite']}: {record['not_run']}")
        for name, peer in record["peers"].items():
            if peer["status"] in FAILED:
                found.append(f"{record['suite']}: {name} {peer['status']}: {peer['reason']}")
    return list(dict.fromkeys(found))


def _records(plan: Plan, args: ModelArgs, ground: _Ground, progress: Callable[[str], None]) -> Iterator[Record]:
    """Every record, as soon as it is there."""
    for case in plan.cases(["kernels"]):
        yield from _op_records(plan, args, case, ground, progress)
    _hand_back(plan.device)
    if cases := plan.cases(WITH_MODEL):
        how: dict[str, Any] = {"device": plan.device, "dtype": plan.dtype, "gpt_fast": plan.gpt_fast}
        with running(plan.peers, plan.source, args, progress, **how) as peers:
            progress(f"loading {plan.source.name}")
            llm = _ours(plan, args)
            for case in cases:
                yield _measured(plan, case, llm, peers, ground, progress)
        del llm
        if plan.nproc > 1:
            driver.shut_down()
        _hand_back(plan.device)
    for case in plan.cases(FRESH):
        progress(f"{case.suite} {plan.source.name} {case.label}")
        yield plan.record_of(case) | _fresh(plan, case, ground)


def _ours(plan: Plan, args: ModelArgs) -> Llama:
    """The plan's model, led where several processes share it."""
    if plan.nproc == 1:
        return build(plan.source, args, plan.device, plan.dtype, plan.backend)
    if not environment.is_distributed():
        driver.start_workers(plan.nproc)
    return driver.build_on_all(
        described,
        source=plan.source.to_json(),
        max_batch_size=args.max_batch_size,
        max_seq_len=args.max_seq_len,
        device=plan.device.type,
        dtype=_name(plan.dtype),
        backend=plan.backend,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hand_back(device: torch.device) -> None:
    """What torch keeps of memory that is free, so that other processes find it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _op_records(
    plan: Plan, args: ModelArgs, case: Case, ground: _Ground, progress: Callable[[str], None]
) -> Iterator[Record]:
    """The kernels suite's records of one case, an op each."""
    bench = kernels.Bench(
        args,
        plan.device,
        plan.dtype,
        plan.backend_name,
        case.rounds,
        ground.probe,
        ground.matmul,
    )
    every = case.context == plan.contexts[0]
    for op in ops_of(args, plan.device, plan.dtype, case.batch, case.context, every):
        say = _saying(progress, f"kernels {plan.source.name} {case.label} {op.name}")
        record = plan.record_of(case) | kernels.measure(op, bench, case.batch, say)
        # What has no bearing on an op is not to tell two measurements of it apart.
        yield record | {"steps": None, "context": None if op.in_any_context else case.context}


def _measured(
    plan: Plan,
    case: Case,
    llm: Llama,
    peers: dict[str, Peer | PeerError | str],
    ground: _Ground,
    progress: Callable[[str], None],
) -> Record:
    """One case's record of ours and the peers in turns."""
    args = llm.model.params
    say = _saying(progress, f"{case.suite} {plan.source.name} {case.label}")
    begin = time.perf_counter()
    driver.run_on_all(llm, _warm, batch=case.batch)
    record = plan.record_of(case) | {"capture_seconds": time.perf_counter() - begin}
    runners = {name: suited(name, peer, case) for name, peer in peers.items()}
    before = ground.matmul.sample().p50
    devices = plan.nproc if plan.device.type == "cuda" else 1
    measured = measure(case, args.vocab_size, Ours(llm), runners, ground.probe, plan.dtype, say, devices)
    matmul = max(before, ground.matmul.sample().p50)
    if case.suite == "decode":
        record |= decode.record(case, measured, args, plan.dtype)
        say("launch by launch")
        record["launches"] = _launches(llm, case, ground.probe, matmul, plan.nproc // devices)
        return record
    of_suite = prefill.record if case.suite == "prefill" else generate.record
    return record | of_suite(case, measured, args, plan.dtype, matmul)


def suited(name: str, peer: Peer | PeerError | str, case: Case) -> Runner | PeerError | str:
    """The peer, or why it does not run this case."""
    if isinstance(peer, Peer) and not PEERS[name].takes_ragged and len(set(case.lengths)) > 1:
        return "it takes equally long prompts only"
    return peer


def _fresh(plan: Plan, case: Case, ground: _Ground) -> Record:
    how = {
        "device": str(plan.device) if plan.nproc == 1 else plan.device.type,
        "dtype": _name(plan.dtype),
        "backend": plan.backend,
        "nproc": plan.nproc,
    }
    if case.suite == "load":
        return load_and_memory.load_record(case, plan.source, how, ground.copy)
    return load_and_memory.memory_record(case, plan.source, how)


def _saying(progress: Callable[[str], None], what: str) -> Callable[[str], None]:
    return lambda text: progress(f"{what}: {text}")


def _warm(llm: Llama, batch: int) -> None:
    llm.decoder.capture_graphs([batch])


def _launches(llm: Llama, case: Case, probe: ReadProbe, matmul: float, sharing: int) -> list[Record]:
    """The launches of a step at half of the case's steps, beside the least that they could take.

    sharing: processes that launch theirs on the same device at the same time.
    """
    before = probe.sample().p50
    times = driver.run_on_all(llm, _launch_times, batch=case.batch, context=case.context + case.steps // 2)
    # The higher neighbour, as in the rounds: shares are not flattered.
    read = max(before, probe.sample().p50)
    machine = Machine(read=read * GIGA / sharing, matmul=matmul * TERA / sharing)
    return [one.against(machine) for one in times]


def _launch_times(llm: Llama, batch: int, context: int) -> list[step_launches.LaunchTime]:
    return step_launches.launch_times(llm.model, batch, context)
