"""A model on two GPUs: one GPU's answers, with collectives in the decode graph."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer
from tests.parallel_cases import answers, build
from tests.processes import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs with NCCL between them"),
]
LOGPROB_TOLERANCE = 2e-5


@pytest.mark.parametrize("shards", [1, 4])
def test_two_gpus_give_one_gpus_answers(tmp_path: Path, shards: int) -> None:
    params = tiny_params(dim=256, n_heads=8, n_kv_heads=2)
    folder = write_meta(tmp_path / "model", params, random_weights(params, seed=7), shards=shards)
    write_tokenizer(folder)
    expected = answers(build(str(folder), device="cuda:0", dtype="float32"))
    found = run_processes(2, tmp_path, "tests.parallel_cases:on_gpus", {"folder": str(folder)})
    assert [one["device"] for one in found] == ["cuda:0", "cuda:1"]
    for one in found:
        assert one["repeats"] and one["answers"]["tokens"] == expected["tokens"]
        for mine, theirs in zip(one["answers"]["logprobs"], expected["logprobs"], strict=True):
            for row, wanted in zip(mine, theirs, strict=True):
                assert row == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)
    assert found[0]["answers"] == found[1]["answers"]
