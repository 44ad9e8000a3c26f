"""`fastllama batch` on several processes: models that share the lines, and processes that share a model."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fastllama.cli.test_batch_resume import COMMAND, N_LINES, many_lines, wait_for_lines
from tests.support.batches import BATCH, Record, all_choices, completion, write_batch
from tests.support.command_line import ROOT, run, run_process
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
GROUPS_OF_ONE = ("--model_parallel_size", "1")
N_REQUESTS = 16


@pytest.mark.parametrize(
    "started",
    parameters(
        {
            "two models, torchrun": (TORCHRUN, GROUPS_OF_ONE),
            "two models, --nproc": ((), ("--nproc", "2", *GROUPS_OF_ONE)),
            "one model, torchrun": (TORCHRUN, ()),
            "one model, --nproc": ((), ("--nproc", "2")),
        },
        ("one model, --nproc",),
    ),
)
def test_several_processes_give_the_answers_of_one(
    tmp_path: Path, started: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    launcher, words = started
    lines: list[Record | str] = [completion(str(number), f"Once {number}", seed=number) for number in range(N_REQUESTS)]
    lines[3], lines[8] = "nonsense", completion("2")  # in different groups than the line of the same custom_id
    lines[9] = completion("2")
    path, alone, together = write_batch(tmp_path / "in.jsonl", lines), tmp_path / "alone", tmp_path / "together"
    assert run("batch", path, str(alone), *BATCH).exit_code == 0
    done = run_process("batch", path, str(together), *BATCH, *words, "--json", launcher=launcher)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["requests"], summary["errors"]) == (N_REQUESTS, 3)
    assert answers(together) == answers(alone)


def answers(path: Path) -> dict[str, object]:
    """What each line got, by its number."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == N_REQUESTS
    return {one["id"]: one["error"] or one["response"]["body"]["choices"] for one in records}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_one_process_goes_on_where_two_ended(tmp_path: Path, sent: signal.Signals) -> None:
    path, out, expected = write_batch(tmp_path / "in.jsonl", many_lines()), tmp_path / "out", tmp_path / "expected"
    words = (path, str(out), *BATCH)
    command = (*COMMAND, *words, "--nproc", "2", *GROUPS_OF_ONE, "--max_batch_size", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for_lines(out, 4)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=HANG_SECONDS)
    if sent == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on" in stderr.strip().splitlines()[-1]
    assert 4 <= out.read_bytes().count(b"\n") < N_LINES
    assert run("batch", *words).exit_code == 0
    assert run("batch", path, str(expected), *BATCH).exit_code == 0
    assert all_choices(out) == all_choices(expected)
