"""`fastllama quantize`."""

import json
import shutil
from pathlib import Path

import torch

from fastllama.checkpoint import open_checkpoint
from tests.support.adapters import random_factors, write_adapter
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.command_line import GREEDY, expect_error, run

PARAMS = tiny_params(hidden_dim=192)
WEIGHTS = random_weights(PARAMS, seed=2)


def test_quantize_writes_a_folder_that_completes(tmp_path: Path) -> None:
    made, out = write_meta(tmp_path / "source", PARAMS, WEIGHTS), tmp_path / "made" / "out"
    write_tokenizer(made)
    shown = run("quantize", str(made), str(out), "--to", "int8")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith(f"{out}: int8 by row; ") and "KiB, before" in shown.stdout
    completed = run("complete", "the", "--ckpt_dir", str(out), "--backend", "reference", *GREEDY)
    assert completed.exit_code == 0 and completed.stdout


def test_quantize_reports_json(tmp_path: Path) -> None:
    made = write_huggingface(tmp_path / "source", PARAMS, WEIGHTS)
    for number, (words, expected) in enumerate(
        [((), "int4 in groups of 64"), (("--group_size", "32"), "int4 in groups of 32")]
    ):
        out = tmp_path / str(number)
        shown = run("quantize", str(made), str(out), "--to", "int4", *words, "--json")
        assert shown.exit_code == 0, shown.stderr
        written = json.loads(shown.stdout)
        checkpoint = open_checkpoint(out)
        assert written["quantized"] == [expected] and written["path"] == str(out)
        assert written["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert written["bytes_before"] == (made / "model.safetensors").stat().st_size
        assert written["parameters"] == checkpoint.n_parameters == sum(weight.numel() for weight in WEIGHTS.values())
        assert written["bytes_by_type"] == checkpoint.bytes_by_type


def test_quantize_merges_adapters_first(tmp_path: Path) -> None:
    made = write_huggingface(tmp_path / "source", PARAMS, WEIGHTS)
    write_adapter(tmp_path / "adapter", random_factors(PARAMS, WEIGHTS, ["up_proj"], seed=0))
    words = ("--to", "int8", "--adapter", str(tmp_path / "adapter"))
    assert run("quantize", str(made), str(tmp_path / "out"), *words).exit_code == 0
    name = "layers.0.feed_forward.w3.weight"
    merged = dict(open_checkpoint(made, [tmp_path / "adapter"]).dense_tensors())[name]
    written = dict(open_checkpoint(tmp_path / "out").dense_tensors())[name]
    assert not torch.equal(merged, WEIGHTS[name])
    assert bool(((written - merged).abs().amax(1) <= merged.abs().amax(1) / 127).all())


def test_quantize_rounds_by_a_text(tmp_path: Path) -> None:
    made = write_meta(tmp_path / "source", PARAMS, WEIGHTS)
    write_tokenizer(made)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there were twelve dogs. " * 40, encoding="utf-8")
    words = ("--to", "int4", "--calibrate", str(text), "--max_tokens", "600", "--device", "cpu")
    shown = run("quantize", str(made), str(tmp_path / "out"), *words)
    assert shown.exit_code == 0, shown.stderr
    assert "int4 in groups of 64, calibrated on 602 tokens; " in shown.stdout  # 600 in two windows
    assert run("quantize", str(made), str(tmp_path / "plain"), "--to", "int4").exit_code == 0
    stored = [dict(open_checkpoint(tmp_path / name).dense_tensors()) for name in ("out", "plain")]
    different = {name for name in WEIGHTS if not torch.equal(stored[0][name], stored[1][name])}
    assert different == {name for name in WEIGHTS if name.startswith("layers.") and WEIGHTS[name].ndim == 2}


def test_quantize_takes_the_tokenizer_that_is_given(tmp_path: Path) -> None:
    made = write_huggingface(tmp_path / "source", PARAMS, WEIGHTS)
    (made / "LICENSES").mkdir()  # a folder, which is not copied
    (made / "LICENSE.txt").write_text("free")
    shown = run("quantize", str(made), str(tmp_path / "none"), "--to", "int8", "--json")
    assert json.loads(shown.stdout)["tokenizer"] is None and "there is no tokenizer in" in shown.stderr
    assert (tmp_path / "none" / "LICENSE.txt").read_text() == "free"
    tokenizer = write_tokenizer(tmp_path)
    given = ("--tokenizer_path", str(tokenizer))
    shown = run("quantize", str(made), str(tmp_path / "given"), "--to", "int8", *given, "--json")
    assert json.loads(shown.stdout)["tokenizer"] == "tokenizer.model" and not shown.stderr
    assert (tmp_path / "given" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    (made / "original").mkdir()
    shutil.copyfile(tokenizer, made / "original" / "tokenizer.model")
    shown = run("quantize", str(made), str(tmp_path / "found"), "--to", "int8", "--json")
    assert json.loads(shown.stdout)["tokenizer"] == "tokenizer.model"
    for layout in (made, write_meta(tmp_path / "meta", PARAMS, WEIGHTS)):
        missing = ("--to", "int8", "--tokenizer_path", str(tmp_path / "no.model"))
        expect_error(run("quantize", str(layout), str(tmp_path / "out"), *missing), "no.model does not exist")
        assert not (tmp_path / "out").exists()


def test_quantize_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    made = str(write_meta(tmp_path / "source", PARAMS, WEIGHTS))
    expect_error(run("quantize", made, made, "--to", "int8"), "expected a new or an empty folder")
    expect_error(run("quantize", made, str(tmp_path / "out"), "--to", "fp8", "--group_size", "64"), "is for int4")
    for words, expected in [
        (("--to", "int8", "--calibrate", "x"), "--calibrate is for int4; int8 has"),
        (("--to", "int4", "--device", "cpu"), "--device is for --calibrate, which"),
        (("--to", "int4", "--max_tokens", "5"), "--max_tokens is for --calibrate, which"),
        (("--to", "int4", "--calibrate", str(tmp_path / "no.txt")), "no.txt: cannot be read (No such file"),
    ]:
        expect_error(run("quantize", made, str(tmp_path / "out"), *words), expected)
    expect_error(run("quantize", made, str(tmp_path / "out")), "Missing option '--to'")
    expect_error(run("quantize", str(tmp_path / "no"), str(tmp_path / "out"), "--to", "int8"), "does not exist")
    assert not (tmp_path / "out").exists()
