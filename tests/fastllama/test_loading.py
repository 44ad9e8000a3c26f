"""Building a model: host memory, the stop tokens of a checkpoint, and where files are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllama import Llama, Tokenizer
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.tiers import parameters

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20
# Prints the peak of anonymous memory (mapped files excluded) that building adds, and the size of the model.
MEASURE = """
import sys, threading, time
import torch
from fastllama import Llama

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder = sys.argv[1]
torch.set_num_threads(1)
Llama.build(sys.argv[2], sys.argv[2] + "/tokenizer.model", 8, 1, device="cpu", dtype="float32")  # fills caches
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
llm = Llama.build(folder, folder + "/tokenizer.model", 8, 1, device="cpu", dtype="float32")
done.set()
watcher.join()
print(peak - before, sum(p.numel() * p.element_size() for p in llm.model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc")
@pytest.mark.parametrize("shards", parameters({"1": 1, "4": 4}, quick=("4",)))
def test_host_memory_stays_near_the_model_while_loading(tmp_path: Path, shards: int) -> None:
    big = tiny_params(dim=512, n_layers=10, n_heads=8, n_kv_heads=8, multiple_of=512)
    for name, params in (("big", big), ("small", tiny_params())):
        write_meta(tmp_path / name, params, random_weights(params), shards=shards, dtype=torch.bfloat16)
        write_tokenizer(tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "small")]
    # With a fixed threshold, the allocator returns freed tensors to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    peak, model = map(int, out.stdout.split())
    largest = 2 * 1536 * 512 * 4  # gate and up together, while they are packed
    assert model > 110 * MEGABYTE and peak < model + 3 * largest


def test_huggingface_stop_tokens_are_added_to_the_tokenizers(tmp_path: Path) -> None:
    params = tiny_params()
    write_huggingface(tmp_path, params, random_weights(params), eos_token_id=[33, 321])
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), 16, 1, device="cpu")
    assert llm.tokenizer.stop_tokens == {321, 329, 33}  # end_of_text, eot_id and the file's


def test_scaled_rope_selects_llama31s_stop_tokens_and_names(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_params(use_scaled_rope=True), random_weights(tiny_params()))
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), 16, 1, device="cpu")
    assert llm.tokenizer.stop_tokens == {321, 329, 328}
    assert llm.tokenizer.decode([328]) == "<|eom_id|>"


def test_original_folder_and_tokenizer_folder_are_found(tmp_path: Path) -> None:
    write_meta(tmp_path / "original", tiny_params(), random_weights(tiny_params()))
    write_tokenizer(tmp_path / "original")
    llm = Llama.build(str(tmp_path), str(tmp_path), 16, 1, device="cpu")
    assert llm.generate([[1, 2]], 2)[0]


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_rope_scaling_factor_overrides_the_checkpoint(tmp_path: Path, factor: float | None) -> None:
    write_meta(tmp_path, tiny_params(use_scaled_rope=True), random_weights(tiny_params()))
    path = str(tmp_path), str(write_tokenizer(tmp_path))
    llm = Llama.build(*path, 16, 1, device="cpu", rope_scaling_factor=factor)
    assert llm.model.params.rope_scaling_factor == (factor or 8.0)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_scaled_rope_of_every_type_allows_long_contexts_and_can_be_replaced(tmp_path: Path, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "factor": 4.0}
    write_huggingface(tmp_path, tiny_params(), random_weights(tiny_params()), rope_parameters=rope)
    path = str(tmp_path), str(write_tokenizer(tmp_path))
    llm = Llama.build(*path, 9000, 1, device="cpu")
    assert isinstance(llm.tokenizer, Tokenizer) and not llm.tokenizer.llama31
    assert llm.model.params.rope_type == rope_type
    replaced = Llama.build(*path, 16, 1, device="cpu", rope_scaling_factor=8.0).model.params
    assert (replaced.rope_type, replaced.rope_scaling_factor) == ("llama3", 8.0)


def test_dtype_and_device_defaults_and_names(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_params(), random_weights(tiny_params()))
    path = str(tmp_path), str(write_tokenizer(tmp_path))
    assert Llama.build(*path, 16, 1, device="cpu").model.dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        model = Llama.build(*path, 16, 1, device=torch.device("cpu"), dtype=dtype).model
        assert model.dtype == model.cache.k.dtype == torch.bfloat16


def test_an_unset_vocabulary_size_is_read_from_the_embedding(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_params(), random_weights(tiny_params()))
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    llm = Llama.build(str(tmp_path), str(write_tokenizer(tmp_path)), 16, 1, device="cpu")
    assert llm.model.params.vocab_size == 576


def test_without_a_tokenizer_path_it_is_the_checkpoints(tmp_path: Path) -> None:
    params = tiny_params()
    write_meta(tmp_path, params, random_weights(params))
    write_tokenizer(tmp_path)
    own, given = (Llama.build(str(tmp_path), path, 16, 1, device="cpu").tokenizer for path in (None, str(tmp_path)))
    assert own.encode("ab cd", bos=True, eos=True) == given.encode("ab cd", bos=True, eos=True)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(AssertionError, match="no tokenizer in the folder"):
        Llama.build(str(tmp_path), None, 16, 1, device="cpu")
