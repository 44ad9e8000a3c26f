"""A script for Meta's package, with only its import changed, under plain python and under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllama import builtin_checkpoint
from tests.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOGPROB_TOLERANCE = 2e-5  # of sums in another order
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

main(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """(ckpt_dir, tokenizer_path) of a random model in four shards, and of the built-in one."""
    folder = tmp_path_factory.mktemp("drop-in")
    write_meta(folder, tiny_params(), random_weights(tiny_params()), shards=4)
    write_tokenizer(folder)
    return {"4 shards": (str(folder), str(folder / "tokenizer.model")), "built-in": builtin_checkpoint()}


def run(launcher: list[str], arguments: tuple[str, str], folder: Path) -> list[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "processes"), [("4 shards", 1), ("4 shards", 2), ("built-in", 2)])
def test_python_and_torchrun_print_the_same(
    folders: dict[str, tuple[str, str]], tmp_path: Path, name: str, processes: int
) -> None:
    plain = run([], folders[name], tmp_path)
    assert plain[0].startswith("the first of two > ") and plain[-1].startswith("assistant ")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    shared = run([*torchrun, "--local-ranks-filter", "0"], folders[name], tmp_path)
    (place,) = (place for place, line in enumerate(plain) if line.startswith("[[-"))
    scores, expected = (json.loads(lines.pop(place)) for lines in (shared, plain))
    assert shared == plain and len(expected) == 2
    for mine, theirs in zip(scores, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=LOGPROB_TOLERANCE * (processes > 1))
