"""The load and memory suites."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastllama.benchmarks.ceilings import Ceiling
from fastllama.benchmarks.child_process import ChildError
from fastllama.benchmarks.models import ModelSource, ModelSpec
from fastllama.benchmarks.statistics import summarize
from fastllama.benchmarks.suites import load_and_memory
from fastllama.benchmarks.suites.interleaved import Case
from fastllama.benchmarks.tables import table_of
from tests.benchmarks.cases import CPU
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

COPY = Ceiling("copy", "GB/s", "given", summarize([1e-6]))


@pytest.mark.slow
def test_load_and_memory_measure_a_fresh_process(tmp_path: Path) -> None:
    params = tiny_params()
    write_meta(tmp_path, params, random_weights(params, seed=3), shards=2)
    write_tokenizer(tmp_path)
    model = ModelSpec(ModelSource.folder(str(tmp_path), None), CPU, torch.float32, max_batch_size=2, max_seq_len=10)
    loaded = load_and_memory.load_record(Case("load", 2, 8, 2, rounds=2), model, nproc=1, copy=COPY)
    json.dumps(loaded, allow_nan=False)
    files = list(tmp_path.glob("*.pth"))
    assert len(files) == 2 and loaded["checkpoint_bytes"] == sum(path.stat().st_size for path in files)
    assert loaded["seconds"]["count"] == 2 and loaded["seconds"]["minimum"] > 0
    assert "GB/s" in table_of([loaded], load_and_memory.LOAD_COLUMNS).text()
    record = load_and_memory.memory_record(Case("memory", 2, 8, 2), model, nproc=1)
    planned = record["planned"]
    assert planned["total"] == planned["weights"] + planned["cache"] + planned["workspace"] > 0
    assert record["peak_bytes"] >= record["held_bytes"] > 0
    nowhere = replace(model, source=ModelSource("no", ckpt_dir="nowhere", tokenizer_path="x"))
    with pytest.raises(ChildError, match="nowhere"):
        load_and_memory.memory_record(Case("memory", 2, 8, 2), nowhere, nproc=1)
