"""`fastllama quality` with the built-in model."""

import json
from pathlib import Path

import pytest

from fastllama.cli.quality import render
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.command_line import expect_error, run
from tests.support.quantized_folders import PARAMS, write_int4

SHORT = ("--max_tokens", "200", "--window", "64")


def test_quality_of_quantised_weights() -> None:
    result = run("quality", *SHORT, "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    names = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    expected = ["text", "tokens", "perplexity", "against", "of the reference", "divergence", "same top token"]
    assert names == ["weights", *expected] and "200 in windows of 64" in result.stdout
    assert cell(result.stdout, "weights") == "int8"
    assert cell(result.stdout, "against") == "the same checkpoint, float32"


def cell(shown: str, name: str) -> str:
    """The value in the row of this name."""
    (value,) = (line.removeprefix(name).strip() for line in shown.splitlines() if line.startswith(f"{name}  "))
    return value


def test_the_models_that_are_compared_are_named(tmp_path: Path) -> None:
    folder, dense = str(write_int4(tmp_path / "stored")), tmp_path / "dense"
    write_huggingface(dense, PARAMS, random_weights(PARAMS, seed=5))  # without a tokenizer
    stored, words = "as stored: int4 in groups of 64", (*SHORT, "--ckpt_dir", folder)
    for more, weights, against, quantized in (
        (("--quantize", "int4"), "int4", f"the same checkpoint, {stored}", ["int4 in groups of 64"]),
        (("--against", str(dense)), stored, f"{dense}, float32", []),
    ):
        shown = run("quality", *words, *more).stdout
        assert (cell(shown, "weights"), cell(shown, "against")) == (weights, against)
        described = json.loads(run("quality", *words, *more, "--json").stdout)
        assert (described["path"], described["quantized"]) == (folder, ["int4 in groups of 64"])
        assert described["against"] == {"path": more[1] if more[0] == "--against" else folder, "quantized": quantized}
    alone = run("quality", *words, "--quantize", "int4", "--against", "none", "--json")
    assert json.loads(alone.stdout)["against"] is None


def test_both_models_read_the_text_with_one_tokenizer(tmp_path: Path, checkpoint: str) -> None:
    params = tiny_params()
    other = write_meta(tmp_path / "other", params, random_weights(params, seed=8))
    words = ("quality", *SHORT, "--ckpt_dir", checkpoint, "--against", str(other))
    assert "against" in run(*words).stdout  # the other has no tokenizer
    own = write_tokenizer(other)
    assert "against" in run(*words).stdout
    lines = own.read_text().splitlines()
    a, b = lines[97].split(), lines[98].split()  # the bytes a and b
    own.write_text("\n".join([*lines[:97], f"{b[0]} {a[1]}", f"{a[0]} {b[1]}", *lines[99:]]) + "\n")
    text = tmp_path / "text.txt"
    text.write_text("12a")
    expect_error(run(*words, "--text", str(text)), "the tokenizers differ", "token 4 of window 1 is 97, and 98 in")
    # The tokenizer that is named is ours, and has to be that of the other checkpoint.
    assert "against" in run(*words, "--text", str(text), "--tokenizer_path", str(own)).stdout


def test_an_infinite_perplexity_is_null_in_json_and_a_word_in_text(tmp_path: Path, checkpoint: str) -> None:
    params = tiny_params()
    weights = random_weights(params, seed=7)
    broken = write_meta(tmp_path, params, weights | {"output.weight": weights["output.weight"] * 1e6})
    words = ("quality", *SHORT, "--ckpt_dir", checkpoint, "--against", str(broken))
    shown = run(*words).stdout
    assert cell(shown, "of the reference") == "infinite" and float(cell(shown, "perplexity")) > 1
    described = json.loads(run(*words, "--json").stdout, parse_constant=pytest.fail)
    assert described["difference"]["reference_perplexity"] is None and described["perplexity"] > 1
    write_tokenizer(tmp_path)
    alone = ("quality", *SHORT, "--ckpt_dir", str(broken))
    assert cell(run(*alone).stdout, "perplexity") == "infinite"
    assert json.loads(run(*alone, "--json").stdout, parse_constant=pytest.fail)["perplexity"] is None


def test_large_perplexities_stay_readable() -> None:
    described = {
        **{"path": "a", "quantized": [], "dtype": "float32", "quantize": "int4", "text": None, "window": 64},
        **{"against": {"path": "b", "quantized": []}, "n_tokens": 9, "perplexity": 1e200},
        "difference": dict.fromkeys(("mean_divergence", "large_divergence", "same_top"), 0.0)
        | {"reference_perplexity": 2.0},
    }
    shown = render(described)
    assert cell(shown, "perplexity") == "1.00e+200" and cell(shown, "of the reference") == "2.0000"


def test_json_has_the_numbers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little cat. " * 20)
    result = run("quality", *SHORT, "--quantize", "int4", "--text", str(text), "--json")
    measured = json.loads(result.stdout)
    assert (measured["quantize"], measured["window"], measured["n_tokens"]) == ("int4", 64, 200)
    assert 0 < measured["difference"]["mean_divergence"] <= measured["difference"]["large_divergence"]
    alone = json.loads(run("quality", *SHORT, "--text", str(text), "--json").stdout)
    assert alone["difference"] is None
    assert alone["perplexity"] == pytest.approx(measured["difference"]["reference_perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "--text nowhere.txt: cannot be read"),
        (("--quantize", "int5"), "'int5' is not one of 'int8', 'fp8', 'int4'"),
        (("--against", "nowhere"), "checkpoint folder 'nowhere' does not exist"),
        (("--window", "1"), "--window"),
        (("--window", "200000"), "'--window': 200000 is not in the range"),
        (("--window", "10000"), "--window must be a whole number from 1 to 8192, got 10000"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run("quality", *SHORT, *arguments)
    expect_error(result, message)
    assert "max_seq_len" not in result.stderr
