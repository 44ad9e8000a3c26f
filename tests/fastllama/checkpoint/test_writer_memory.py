"""Host memory while a quantised folder is written: near one weight and one file, whatever the model's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import random_weights, tiny_params, write_meta

ROOT = Path(__file__).resolve().parents[3]
SHARD_BYTES = 4_000_000
# Writes the checkpoint given first to folders in the one given second. Prints for each number of bytes of a file the
# peak of anonymous memory above that before writing. The last number is the control, for which all stays in memory.
MEMORY_PROBE = """
import gc, json, sys, threading
from pathlib import Path
import torch
from fastllama.checkpoint import open_checkpoint
from fastllama.checkpoint.quantized_writer import write_quantized

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak(shard_bytes, name):
    gc.collect()
    start, peaks, done = anonymous(), [], threading.Event()
    def sample():
        while not done.wait(0.0005):
            peaks.append(anonymous())
    sampler = threading.Thread(target=sample)
    sampler.start()
    checkpoint = open_checkpoint(sys.argv[1])
    options = {"with_output": True, "config": {}, "copy_others": lambda folder: None, "progress": False}
    write_quantized(checkpoint, Path(sys.argv[2], name), "int8", **options, shard_bytes=shard_bytes)
    done.set()
    sampler.join()
    return max(peaks) - start

torch.set_num_threads(1)
peak(int(sys.argv[3]), "warm")
print(json.dumps([peak(int(sys.argv[3]), "few"), peak(2**40, "control")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_writing_keeps_memory_near_one_weight_and_one_file(tmp_path: Path) -> None:
    params = tiny_params(dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, multiple_of=256)
    shapes = random_weights(params, dtype=torch.bfloat16)
    weights = {name: torch.full_like(weight, 0.5) for name, weight in shapes.items()}
    made = write_meta(tmp_path / "made", params, weights, shards=1)
    largest = 4 * max(weight.numel() for weight in weights.values())  # in float32
    total = sum(weight.numel() for weight in weights.values())  # in int8
    command = [sys.executable, "-c", MEMORY_PROBE, str(made), str(tmp_path), str(SHARD_BYTES)]
    # glibc keeps some freed blocks. With these limits it maps and returns large blocks, so only live memory counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, control = json.loads(done.stdout)
    limit = 5 * largest + 2 * SHARD_BYTES
    assert few < limit < total, f"{few / 2**20:.0f} MiB, limit {limit / 2**20:.0f}, total {total / 2**20:.0f}"
    assert control > total, f"{control / 2**20:.0f} MiB, total {total / 2**20:.0f}"
