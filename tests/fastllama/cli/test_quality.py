"""`fastllama quality` with the built-in model."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import run

SHORT = ("--max_tokens", "200", "--window", "64")


def test_quality_of_quantised_weights() -> None:
    result = run("quality", *SHORT, "--quantize", "int8")
    assert result.exit_code == 0, result.stderr
    names = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    expected = ["quantize", "text", "tokens", "perplexity", "of the reference", "divergence", "same top token"]
    assert names == expected and "200 in windows of 64" in result.stdout


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
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run("quality", *SHORT, *arguments)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout
