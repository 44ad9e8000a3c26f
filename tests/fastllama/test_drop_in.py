"""A script written for Meta's package runs with only its imports changed, under python and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama import builtin_checkpoint
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_logprobs
from tests.support.tiers import parameters
from tests.support.timeouts import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from typing import List
from fastllama import Dialog, Llama
from fastllama.generation import CompletionPrediction, ChatPrediction, sample_top_p
from fastllama.model import ModelArgs, Transformer
from fastllama.tokenizer import ChatFormat, Message, Tokenizer

def main(ckpt_dir: str, tokenizer_path: str, max_seq_len: int = 64, max_batch_size: int = 4):
    generator = Llama.build(
        ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len, max_batch_size=max_batch_size
    )
    prompts: List[str] = ["the first of two", "and the second, which is longer,"]
    results = generator.text_completion(prompts, max_gen_len=12, temperature=0.6, top_p=0.9, logprobs=True)
    dialogs: List[Dialog] = [[{"role": "user", "content": "hello"}]]
    answers = generator.chat_completion(dialogs, max_gen_len=None, temperature=0.6, top_p=0.9)
    for prompt, result in zip(prompts, results):
        print(prompt, ">", result["generation"])
    print(json.dumps([result["logprobs"] for result in results]))
    print(answers[0]["generation"]["role"], answers[0]["generation"]["content"])

for ckpt_dir, tokenizer_path in zip(sys.argv[1::2], sys.argv[2::2]):
    main(ckpt_dir, tokenizer_path)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in four shards, and the script."""
    folder = tmp_path_factory.mktemp("drop-in")
    write_meta(folder, tiny_params(), random_weights(tiny_params()), shards=4)
    write_tokenizer(folder)
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run(folder: Path, *launcher: str) -> list[str]:
    """The script's output lines for that model and for the built-in one."""
    models = (str(folder), str(folder / "tokenizer.model"), *builtin_checkpoint())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(folder / "script.py"), *models]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[str]:
    """The output without torchrun."""
    lines = run(folder)
    assert lines[0].startswith("the first of two > ") and lines[-1].startswith("assistant ")
    return lines


@pytest.mark.parametrize("processes", parameters({"1": 1, "2": 2}, quick=("2",)))
def test_python_and_torchrun_print_the_same(folder: Path, plain: list[str], processes: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    shared = run(folder, *torchrun, "--local-ranks-filter", "0")
    assert len(shared) == len(plain)
    n_scored = 0
    for line, expected in zip(shared, plain, strict=True):
        if not expected.startswith("[[-"):
            assert line == expected
            continue
        scores = json.loads(expected)
        assert_same_logprobs(json.loads(line), scores, "divided logprobs")
        n_scored += len(scores)
    assert n_scored == 2 * 2  # two prompts of two models
