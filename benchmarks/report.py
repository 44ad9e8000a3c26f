"""A result as text or Markdown: the machine and its ceilings, then the tables of each suite."""

from collections.abc import Sequence
from pathlib import Path

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.result_file import AS_STORED, ResultFile
from fastllama.benchmarks.suites import (
    decode,
    generate,
    kernels,
    load_and_memory,
    prefill,
    requests,
    speculate,
    step_launches,
)
from fastllama.benchmarks.tables import Columns, Record, Table, peer_columns, table_of

COLUMNS: dict[str, Columns] = {
    "kernels": kernels.COLUMNS,
    "decode": decode.COLUMNS,
    "prefill": prefill.COLUMNS,
    "generate": generate.COLUMNS,
    "requests": requests.COLUMNS,
    "speculate": speculate.COLUMNS,
    "load": load_and_memory.LOAD_COLUMNS,
    "memory": load_and_memory.MEMORY_COLUMNS,
}
LAUNCHES_TITLE = "a step launch by launch: how many, µs of one, % of the speed of light"
BUSY_CORES = 0.1  # a note is printed if other programs use more cores


def report(result: ResultFile, in_markdown: bool = False) -> str:
    """The tables of a result of `fastllama bench`."""
    environment = result.environment
    kernels = f", native kernels for {environment.instruction_set}" if environment.instruction_set else ""
    machine = f"{environment.device_name}, {environment.threads} threads, torch {environment.torch}{kernels}"
    ceilings = [_describe(ceiling) for ceiling in result.ceilings.values()]
    lines = [machine, "", *(f"- {line}" for line in ceilings)] if in_markdown else [machine, *ceilings]
    for suite in dict.fromkeys(record["suite"] for record in result.records):
        records = [record for record in result.records if record["suite"] == suite]
        title = _title(suite, records[0])
        lines += ["", f"**{title}**" if in_markdown else title]
        for part in _parts(suite, records):
            blank = [""] if in_markdown else []
            lines += [*blank, part.text(in_markdown) if isinstance(part, Table) else part]
    if result.interrupted:
        lines += ["", "interrupted: only finished cases are shown"]
    return "\n".join(lines)


def _title(suite: str, first: Record) -> str:
    nproc = first.get("nproc", 1)
    where = f" on {nproc} processes" if nproc > 1 else ""
    precision = f"{first['dtype']}{_weights_text(first.get('quantize'))}"
    model = f"{first['model']} in {precision}{where}, {first['rounds']} rounds"
    return {
        "kernels": f"kernels of {model}: {first.get('backend')} backend",
        "decode": f"decode of {model}, {first['steps']} greedy tokens",
        "prefill": f"prefill of {model}",
        "generate": f"generate on {model}: ragged prompts, {first['steps']} greedy tokens each",
        "requests": f"requests to {model}{_requests_text(first)}",
        "speculate": f"answers of {model}, up to {first['steps']} tokens, without and with {_guesses_text(first)}",
        "load": f"load {first['model']} as {precision}{where}, {first['rounds']} rounds",
        "memory": f"memory of {first['model']} in {precision}{where}, MiB{' of the first' if where else ''}",
    }[suite]


def _requests_text(first: Record) -> str:
    """The workload of the requests suite. A record of a case that was not run lacks it."""
    if "num_prompts" not in first:
        return ""
    ranges = (f"{min(first[name])}-{max(first[name])}" for name in ("input_lens", "output_lens"))
    common = f", {first['prefix']} of them common" if first["prefix"] else ""
    prompts, answers = ranges
    return f": {first['num_prompts']} with prompts of {prompts} tokens{common}, answers of {answers}"


def _guesses_text(first: Record) -> str:
    """What is guessed in the speculate suite."""
    draft = f" of {Path(first['draft']).name}" if first.get("draft") else ""
    return f"guesses ({first.get('speculate')}{draft}, {first.get('n_guesses')})"


def _weights_text(quantize: str | None) -> str:
    if quantize is None:
        return ""
    return f", weights {AS_STORED}" if quantize == AS_STORED else f", {quantize} weights"


def _parts(suite: str, records: Sequence[Record]) -> list[Table | str]:
    """The tables of one suite, and the notes below them."""
    measured = [record for record in records if "not_run" not in record]
    not_run = dict.fromkeys(f"not run: {record['not_run']}" for record in records if "not_run" in record)
    if not measured:
        return [*not_run, *notes(records)]
    table = table_of(measured, {**COLUMNS[suite], **peer_columns(measured)})
    parts: list[Table | str] = [table, *notes(records), *not_run]
    if suite == "decode" and all("launches" in record for record in measured):
        parts += [LAUNCHES_TITLE, table_of(measured, step_launches.columns(measured))]
    return parts


def notes(records: Sequence[Record]) -> list[str]:
    """The notes below a table: why a peer was not timed, how many tokens were compared, other programs' CPU use."""
    found = []
    peers = [(record, name, peer) for record in records for name, peer in record["peers"].items()]
    for _, name, peer in peers:
        if peer["status"] != "measured":
            found.append(f"{name} {peer['status']}: {peer['reason']}")
    for record, name, peer in peers:
        agreement = peer.get("agreement")
        if peer["status"] == "measured" and agreement and agreement["tokens_compared"] < agreement["tokens_total"]:
            found.append(
                f"{name}: {agreement['tokens_compared']} of {agreement['tokens_total']} tokens compared at batch "
                f"{record['batch']} context {record['context']}, up to a tie where the two chose different tokens"
            )
    busy = [record["other_cores"] for record in records if record["other_cores"] > BUSY_CORES]
    if busy:
        found.append(
            f"other programs used up to {max(busy):.1f} cores during {len(busy)} of {len(records)} measurements; "
            "measure again without them"
        )
    return list(dict.fromkeys(found))


def _describe(ceiling: Ceiling) -> str:
    samples = ceiling.samples
    digits = 1 if samples.p50 >= 10 else 3
    middle, low, high, best = (
        f"{value:.{digits}f}" for value in (samples.p50, samples.p10, samples.p90, samples.maximum)
    )
    return f"{ceiling.name:6} {middle} {ceiling.unit} (p10 {low}, p90 {high}, best {best}; {ceiling.method})"
