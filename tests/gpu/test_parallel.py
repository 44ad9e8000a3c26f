"""A model on two GPUs: the same answers as on one GPU, with collectives in the decode graph, and the commands."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fastllama.distributed.worker_processes import EXIT_WORKER_CRASHED
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.command_line import ROOT, run_process
from tests.support.comparisons import assert_same_logprobs
from tests.support.parallel_cases import PROMPTS, STEPS, answers, assert_alike, build
from tests.support.processes import run_processes
from tests.support.tiny import write_endless_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs with NCCL between them"),
]


@pytest.mark.parametrize("shards", [1, 4])
def test_two_gpus_give_one_gpus_answers(tmp_path: Path, shards: int) -> None:
    params = tiny_params(dim=256, n_heads=8, n_kv_heads=2)
    folder = write_meta(tmp_path / "model", params, random_weights(params, seed=7), shards=shards)
    write_tokenizer(folder)
    llm = build(str(folder), device="cuda:0", dtype="float32")
    expected = answers(llm)
    tokens, scores = llm.generate(PROMPTS[1:2], STEPS, temperature=0.0, logprobs=True)
    found = run_processes(2, tmp_path, "tests.support.parallel_cases:on_gpus", {"folder": str(folder)})
    assert [one["device"] for one in found] == ["cuda:0", "cuda:1"]
    for one in found:
        assert one["repeats"] and one["graphs"] == [1, 4]
        assert one["alone"][0] == tokens
        assert_same_logprobs(one["alone"][1], scores, "divided logprobs")
        assert_alike(one["answers"], expected)
    assert found[0]["answers"] == found[1]["answers"] and found[0]["bfloat16"] == found[1]["bfloat16"]


def test_a_chat_on_two_gpus() -> None:
    words = ("chat", "--temperature", "0", "--max_gen_len", "8", "--max_seq_len", "128", "--dtype", "float32")
    alone, together = (run_process(*words, *options, stdin="Hello\n") for options in ((), ("--nproc", "2")))
    assert together.returncode == 0, together.stderr
    assert alone.stdout == together.stdout and len(together.stdout.splitlines()) == 1


def test_a_killed_process_ends_the_command(tmp_path: Path) -> None:
    """The command ends, although NCCL in its first process would wait forever."""
    words = ["complete", "Once", "--ckpt_dir", write_endless_checkpoint(tmp_path), "--nproc", "2"]
    words += ["--max_seq_len", "8000", "--temperature", "0"]
    pipe = subprocess.PIPE
    command = subprocess.Popen(
        [sys.executable, "-m", "fastllama", *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    try:
        assert command.stdout is not None and command.stdout.read(1)
        psutil.Process(command.pid).children()[0].kill()
        _, stderr = command.communicate(timeout=10)
        assert command.returncode == EXIT_WORKER_CRASHED and "was killed by signal 9" in stderr
    finally:
        command.kill()


def test_a_benchmark_on_two_gpus() -> None:
    sizes = ("--suite", "decode,memory", "--batch", "1,2", "--context", "32", "--steps", "4", "--rounds", "1")
    found = run_process("bench", *sizes, "--nproc", "2", "--peers", "none", "--no_plots", "--json")
    assert found.returncode == 0, found.stderr
    launches = json.loads(found.stdout)["records"][0]["launches"]
    assert all(one["microseconds"]["p50"] > 0 for one in launches)
    assert [one["launch"] for one in launches][-2:] == ["all-reduce", "all-gather"]
