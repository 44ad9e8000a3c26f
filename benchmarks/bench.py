"""One run of the benchmarks: measures the cases of a plan. The result file is written after every case."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from fastllama.benchmarks.ceilings import AdjacentSamples, Probes, machine_of
from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.environment import describe_environment
from fastllama.benchmarks.models import ModelSource, ModelSpec, build_from_json
from fastllama.benchmarks.peers.registry import PEERS, Peer, start_peers
from fastllama.benchmarks.result_file import AS_STORED, FAILED, ResultFile, write_result
from fastllama.benchmarks.runners import FixedBatches, OurEngine, Ours, Runner
from fastllama.benchmarks.suites import decode, generate, interleaved, kernels, load_and_memory, prefill, step_launches
from fastllama.benchmarks.suites import requests as requests_suite
from fastllama.benchmarks.suites import speculate as speculate_suite
from fastllama.benchmarks.suites.interleaved import Case, Progress, Suite
from fastllama.benchmarks.suites.op_cases import ops_of
from fastllama.benchmarks.suites.requests import DEFAULT_REQUESTS, FIXED, RequestsCase
from fastllama.benchmarks.suites.speculate import DEFAULT_SPECULATION, MOST_PROMPT_TOKENS, Speculation
from fastllama.benchmarks.tables import Record
from fastllama.checkpoint.base import dtype_name
from fastllama.distributed import driver, environment
from fastllama.generation import Llama
from fastllama.kernels import select
from fastllama.quantization import check_quantize

DEFAULT_BATCHES = (1, 4)
DEFAULT_CONTEXTS = (32, 512)
PEER_SUITES = ("decode", "prefill", "generate")  # run one batch on ours and the peers
SERVING_SUITES = ("requests",)  # run many requests on ours and the peers
CHILD_PROCESS_SUITES = ("load", "memory")  # build a model in a child process


@dataclass(frozen=True)
class Plan:
    """What to run: each suite with each batch and context, on one model."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None
    quantize: str | None = None
    suites: Sequence[Suite] = ("decode",)
    batches: Sequence[int] = DEFAULT_BATCHES
    contexts: Sequence[int] = DEFAULT_CONTEXTS
    steps: int = interleaved.DEFAULT_STEPS
    rounds: int = interleaved.DEFAULT_ROUNDS
    peers: Sequence[str] = ()
    gpt_fast: str | None = None  # the folder of its code
    requests: int = DEFAULT_REQUESTS  # in the requests suite
    prefix: int = 0  # tokens that all its prompts begin with
    clients: int = 0  # its requests at a time; 0: as many as rows
    speculation: Speculation = DEFAULT_SPECULATION  # in the speculate suite
    nproc: int = 1  # processes that share our model, one on each GPU; a peer has one

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in interleaved.SUITES:
                raise ValueError(f"unknown suite {suite!r}: expected one of {', '.join(interleaved.SUITES)}")
        if self.quantize and "kernels" in self.suites:
            raise ValueError("the kernels suite measures the ops of dense weights: omit it or quantize")
        for suite, measured in (("kernels", "the launches"), ("requests", "the engine"), ("speculate", "a model")):
            if self.nproc > 1 and suite in self.suites:
                raise ValueError(f"the {suite} suite measures {measured} of one process: omit it or nproc")
        if self.requests < 1 or self.prefix < 0 or self.clients < 0:
            numbers = self.requests, self.prefix, self.clients
            raise ValueError(f"expected at least 1 request, and no prefix or clients below 0, got {numbers}")
        if self.clients and len(self.batches) > 1:  # the model has as many rows as the largest
            raise ValueError(f"with --clients there must be one --batch, the number of rows, got {list(self.batches)}")

    def cases(self, suites: Sequence[str]) -> list[Case]:
        """The plan's cases whose suite is in `suites`."""
        cases = [
            self._case(suite, batch, context)
            for suite in self.suites
            if suite in suites
            for context in self.contexts
            for batch in self.batches
        ]
        # Loading depends on the size of the cache only. Speculation has prompts of its own.
        largest = max(self.batches), max(self.contexts)
        cases = [case for case in cases if case.suite != "speculate" or case.context == self.contexts[0]]
        return [case for case in cases if case.suite != "load" or (case.batch, case.context) == largest]

    def _case(self, suite: Suite, batch: int, context: int) -> Case:
        if suite == "requests":
            numbers = self.requests, self.prefix, self.clients
            return RequestsCase(suite, batch, context, self.steps, self.rounds, *numbers)
        return Case(suite, batch, context, 1 if suite == "prefill" else self.steps, self.rounds)

    @cached_property
    def model(self) -> ModelSpec:
        """The model, with a cache just large enough for every case."""
        prefix = self.prefix if "requests" in self.suites else 0
        sizes = max(self.batches), prefix + max(self.contexts) + self.steps
        return ModelSpec(self.source, self.device, self.dtype, *sizes, self.backend, self.quantize)

    def record_of(self, case: Case) -> Record:
        """The keys with which every record of a case begins."""
        settings = {"dtype": dtype_name(self.dtype), "backend": self.model.backend_name, "nproc": self.nproc}
        if self.quantize is not None:
            settings["quantize"] = self.quantize
        elif case.suite != "kernels" and self.model.schemes:
            settings["quantize"] = AS_STORED
        return asdict(case) | {"model": self.source.name} | settings


def run(plan: Plan, progress: Progress, output: str | Path | None = None) -> ResultFile:
    """Measure a plan. `output` is the result file. Ctrl-C ends the run early, with `interrupted` in the result.

    ValueError or OSError before anything is measured, for a plan that cannot run or a file that cannot be written.
    """
    args = plan.model.args  # these three lines raise for a plan that cannot run
    _ = plan.model.backend_name
    check_quantize(plan.quantize, args.split(plan.nproc), plan.device)

    def write(result: ResultFile) -> None:
        if output is not None:
            write_result(result, output)

    result = ResultFile(describe_environment(plan.device, select.instruction_set(plan.backend, plan.device)), {})
    write(result)
    try:
        progress("measuring the machine")
        probes = Probes(plan.device, plan.dtype)
        for record in _records(plan, probes, progress):
            result = replace(result, ceilings=probes.ceilings(), records=[*result.records, record])
            write(result)
    except KeyboardInterrupt:
        result = replace(result, interrupted=True)
        write(result)
    return result


def failures(result: ResultFile) -> list[str]:
    """One line for each failure in a result: outputs that disagree and peers that failed."""
    found = []
    for record in result.records:
        if record.get("status") in FAILED:
            found.append(f"{record['suite']}: {record['not_run']}")
        for name, peer in record["peers"].items():
            if peer["status"] in FAILED:
                found.append(f"{record['suite']}: {name} {peer['status']}: {peer['reason']}")
    return list(dict.fromkeys(found))


def _records(plan: Plan, probes: Probes, progress: Progress) -> Iterator[Record]:
    """Measure all cases and yield their records."""
    for case in plan.cases(["kernels"]):
        yield from _op_records(plan, case, probes, progress)
    torch.cuda.empty_cache()  # for the peers' processes
    for suites in (PEER_SUITES, SERVING_SUITES):
        if cases := plan.cases(suites):
            yield from _records_with_peers(plan, cases, suites is SERVING_SUITES, probes, progress)
    if cases := plan.cases(["speculate"]):
        yield from _speculation_records(plan, cases, progress)
    for case in plan.cases(CHILD_PROCESS_SUITES):
        progress(f"{case.suite} {plan.source.name} {case.label}")
        yield plan.record_of(case) | _child_process_record(plan, case, probes)


def _records_with_peers(
    plan: Plan, cases: list[Case], serves: bool, probes: Probes, progress: Progress
) -> Iterator[Record]:
    """Measure cases on ours and the peers. serves: those of many requests."""
    with start_peers(plan.peers, plan.model, plan.gpt_fast, progress, serves=serves) as peers:
        progress(f"loading {plan.source.name}")
        llm = _build(plan)
        for case in cases:
            yield _case_record(plan, case, llm, peers, probes, progress)
    del llm
    if plan.nproc > 1:
        driver.shut_down()
    torch.cuda.empty_cache()


def _speculation_records(plan: Plan, cases: list[Case], progress: Progress) -> Iterator[Record]:
    """Measure answers with and without guesses."""
    progress(f"loading {plan.source.name}")
    llm = speculate_suite.build(replace(plan.model, max_seq_len=MOST_PROMPT_TOKENS + plan.steps), plan.speculation)
    for case in cases:
        case_progress = _prefixed(progress, f"speculate {plan.source.name} batch {case.batch}")
        for record in speculate_suite.records(case, llm, plan.speculation, case_progress):
            yield plan.record_of(case) | {"context": None} | record


def _build(plan: Plan) -> Llama:
    """Build the plan's model. If several processes share it, the driver builds it on all of them."""
    if plan.nproc == 1:
        return plan.model.build()
    if not environment.is_distributed():
        driver.start_workers(plan.nproc)
    return driver.build_on_all(build_from_json, **_on_own_device(plan.model).to_json())


def _on_own_device(model: ModelSpec) -> ModelSpec:
    """The model for several processes: without a GPU index, so that each process uses its own GPU."""
    return replace(model, device=torch.device(model.device.type))


def _op_records(plan: Plan, case: Case, probes: Probes, progress: Progress) -> Iterator[Record]:
    """The kernels suite's records of one case, one for each op."""
    bench = kernels.Bench(plan.model, case.rounds, probes)
    for op in ops_of(plan.model, case.batch, case.context, every=case.context == plan.contexts[0]):
        op_progress = _prefixed(progress, f"kernels {plan.source.name} {case.label} {op.name}")
        record = plan.record_of(case) | kernels.measure_op(op, bench, op_progress)
        # Values that an op does not depend on are None, because `compare` would treat them as another case.
        yield record | {"steps": None, "context": None if op.independent_of_context else case.context}


def _case_record(
    plan: Plan,
    case: Case,
    llm: Llama,
    peers: dict[str, Peer | ChildError | str],
    probes: Probes,
    progress: Progress,
) -> Record:
    """The record of one case on ours and the peers."""
    args = llm.model.params
    progress = _prefixed(progress, f"{case.suite} {plan.source.name} {case.label}")
    begin = time.perf_counter()
    # The engine runs fewer rows when requests end.
    sizes = list(range(1, case.batch + 1)) if isinstance(case, RequestsCase) else [case.batch]
    driver.run_on_all(llm, _warm, sizes=sizes)
    record = plan.record_of(case) | {"capture_seconds": time.perf_counter() - begin}
    samples = AdjacentSamples(probes.matmul)
    devices = plan.nproc if plan.device.type == "cuda" else 1
    run_case = partial(
        interleaved.run_case,
        case,
        args.vocab_size,
        probe=probes.read,
        dtype=None if plan.model.quantize else plan.dtype,
        progress=progress,
        devices=devices,
    )
    if isinstance(case, RequestsCase):
        case_runs = run_case(OurEngine(llm), {FIXED: FixedBatches(llm), **peers})
        return record | requests_suite.record(case, case_runs)
    case_runs = run_case(Ours(llm), {name: runner_for(name, peer, case) for name, peer in peers.items()})
    matmul = samples.higher()
    if case.suite == "decode":
        record |= decode.record(case, case_runs, args, plan.dtype, plan.model.schemes)
        progress("launch by launch")
        record["launches"] = _launches(llm, case, probes, matmul, plan.nproc // devices)
        return record
    if case.suite == "prefill":
        return record | prefill.record(case, case_runs, args, plan.dtype, matmul)
    return record | generate.record(case, case_runs, args, plan.dtype, matmul, plan.model.schemes)


def runner_for(name: str, peer: Peer | ChildError | str, case: Case) -> Runner | ChildError | str:
    """The peer, or the reason why it does not run this case."""
    if isinstance(peer, Peer) and not PEERS[name].takes_ragged and len(set(case.lengths)) > 1:
        return "it takes equally long prompts only"
    return peer


def _child_process_record(plan: Plan, case: Case, probes: Probes) -> Record:
    model = replace(plan.model, max_batch_size=case.batch, max_seq_len=case.context + case.steps)
    if plan.nproc > 1:
        model = _on_own_device(model)
    if case.suite == "load":
        return load_and_memory.load_record(case, model, plan.nproc, probes.copy)
    return load_and_memory.memory_record(case, model, plan.nproc)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda text: progress(f"{prefix}: {text}")


def _warm(llm: Llama, sizes: list[int]) -> None:
    llm.decoder.capture_graphs(sizes)


def _launches(llm: Llama, case: Case, probes: Probes, matmul: float, n_sharing: int) -> list[Record]:
    """The launches of a step halfway through the case's steps, on a device that `n_sharing` processes share."""
    samples = AdjacentSamples(probes.read)
    times = driver.run_on_all(llm, _launch_times, batch=case.batch, context=case.context + case.steps // 2)
    machine = machine_of(samples.higher(), matmul, 1 / n_sharing)
    return [one.against(machine) for one in times]


def _launch_times(llm: Llama, batch: int, context: int) -> list[step_launches.LaunchTime]:
    return step_launches.launch_times(llm.model, batch, context)
