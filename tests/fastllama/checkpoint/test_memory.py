"""Host memory while a checkpoint is read: near one tensor, in every layout, with an adapter, and dequantised."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.adapters import random_factors, write_adapter
from tests.support.checkpoints import huggingface_weights, random_weights, tiny_params, write_meta
from tests.support.quantized_folders import awq_parts, gptq_parts, write_folder

ROOT = Path(__file__).resolve().parents[3]

# Iterates the checkpoints given as arguments. Prints for each the peak of anonymous memory above that before opening,
# when every tensor is released at once. The last measurement, the control, keeps all tensors.
MEMORY_PROBE = """
import gc, json, os, sys, threading
from fastllama.checkpoint import open_checkpoint

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak(folder, world_size, keep):
    gc.collect()
    start, peaks, done = anonymous(), [], threading.Event()
    has_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    checkpoint = open_checkpoint(folder, [folder] if has_adapter else [])
    def sample():
        while not done.wait(0.0005):
            peaks.append(anonymous())
    sampler = threading.Thread(target=sample)
    sampler.start()
    kept = []
    for name, tensor in checkpoint.tensors(0, world_size):
        for part in (tensor.values, tensor.scales) if hasattr(tensor, "group_size") else (tensor,):
            part.amax()
        peaks.append(anonymous())
        if keep:
            kept.append(tensor)
        del tensor, part
    done.set()
    sampler.join()
    return max(peaks) - start

folders = sys.argv[1:]
result = {folder: [peak(folder, 1, False), peak(folder, 2, False)] for folder in folders}
result["control"] = [peak(folders[0], 1, True)]
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")
def test_tensors_keep_memory_near_one_tensor(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.gguf_files import metadata, quantised, write_gguf

    params = tiny_params(dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, multiple_of=256)
    weights = {name: torch.ones_like(weight) for name, weight in random_weights(params, dtype=torch.float32).items()}
    largest = max(weight.nbytes for weight in weights.values())
    total = sum(weight.nbytes for weight in weights.values())
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    sharded, single, safetensors = tmp_path / "sharded", tmp_path / "single", tmp_path / "safetensors"
    write_meta(sharded, params, weights, shards=4)
    write_meta(single, params, weights, shards=1)
    safetensors.mkdir()
    (safetensors / "config.json").write_text(json.dumps(config))
    save_file(huggingface_weights(params, weights), safetensors / "model.safetensors")
    adapted = tmp_path / "adapted"
    shutil.copytree(safetensors, adapted)
    write_adapter(adapted, random_factors(params, weights, ["q_proj", "o_proj", "up_proj", "down_proj"], seed=0))
    dequantised = [tmp_path / f"{kind}.gguf" for kind in ("F32", "Q8_0")]
    for path in dequantised:
        write_gguf(path, metadata(params), quantised(weights, path.stem))
    packed = {"awq": tmp_path / "awq", "gptq": tmp_path / "gptq"}
    module, shape = "model.layers.0.mlp.up_proj", (2816, 1024)
    for kind, make in (("awq", awq_parts), ("gptq", gptq_parts)):
        fields = {"quant_method": kind, "bits": 4, "group_size": 128}
        write_folder(packed[kind], fields, {module: make(shape, 128, seed=0)[0]}, params | {"hidden_dim": 2816})
    del weights

    folders = (sharded, single, safetensors, adapted, *dequantised, *packed.values())
    command = [sys.executable, "-c", MEMORY_PROBE, *map(str, folders)]
    # glibc keeps some freed blocks. With these limits it maps and returns large blocks, so only live memory counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    peaks = json.loads(finished.stdout)
    assert peaks["control"][0] > total / 2, "the probe does not measure kept tensors"
    assert max(peaks[str(sharded)]) < 1.5 * largest
    assert max(peaks[str(safetensors)]) < 1.5 * largest
    assert max(peaks[str(adapted)]) < 1.5 * largest
    assert max(peaks[str(dequantised[1])]) < 1.5 * largest
    for path in packed.values():  # the largest others are in bfloat16
        assert max(peaks[str(path)]) < largest
    for path in (single, dequantised[0]):
        assert max(peaks[str(path)]) < 0.5 * largest, "one file in torch's types is read without a copy"
