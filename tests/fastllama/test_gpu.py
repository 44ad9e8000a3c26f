"""The whole model on an NVIDIA GPU: the same tokens as on the CPU, and the defaults that CUDA gets."""

from pathlib import Path

import pytest
import torch

from fastllama import Llama
from tests.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]
PROMPTS = [[5, 250, 17, 300, 41], [9], list(range(100, 140)), [31, 32]]
MAX_GEN_LEN = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    write_meta(path, tiny_params(), random_weights(tiny_params(), seed=3))
    write_tokenizer(path)
    return path


def build(folder: Path, device: str | None, dtype: str | None) -> Llama:
    return Llama.build(str(folder), str(folder / "tokenizer.model"), 64, 4, device=device, dtype=dtype)


def test_float32_matches_the_cpu(folder: Path) -> None:
    on_cpu = build(folder, "cpu", "float32").generate(PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True, echo=True)
    on_gpu = build(folder, "cuda", "float32").generate(PROMPTS, MAX_GEN_LEN, temperature=0, logprobs=True, echo=True)
    assert on_gpu[0] == on_cpu[0]
    for ours, expected in zip(on_gpu[1] or [], on_cpu[1] or [], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), atol=1e-3, rtol=0)


def test_seeded_draws_match_the_cpu(folder: Path) -> None:
    rows = [build(folder, device, "float32").generate(PROMPTS, 8, seed=11)[0] for device in ("cpu", "cuda")]
    assert rows[0] == rows[1]


def test_defaults_are_cuda_and_half_precision(folder: Path) -> None:
    llm = build(folder, None, None)
    assert llm.model.device.type == "cuda"
    assert llm.model.dtype == (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
    first = llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0)
    assert all(llm.generate(PROMPTS, MAX_GEN_LEN, temperature=0) == first for _ in range(5))
