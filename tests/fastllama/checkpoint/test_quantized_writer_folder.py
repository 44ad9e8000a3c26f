"""The folder that `write_quantized` writes: shards, taken folders, runs that end early, quantised checkpoints."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastllama.checkpoint import open_checkpoint, quantized_writer
from tests.fastllama.checkpoint.test_quantized_writer import PARAMS, WEIGHTS, source, write
from tests.support.checkpoints import write_meta
from tests.support.quantized_folders import gptq_parts, linear_weights, write_folder


def test_shards_have_an_index(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "huggingface")
    whole = dict(open_checkpoint(write(made, tmp_path / "one", "int4")).dense_tensors())
    out = write(made, tmp_path / "several", "int4", shard_bytes=300_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((out / name).stat().st_size < 310_000 for name in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [tensor.nbytes for name in files for tensor in load_file(out / name).values()]
    assert index["metadata"]["total_size"] == sum(sizes) and len(index["weight_map"]) == len(sizes)
    for name, weight in open_checkpoint(out).dense_tensors():
        assert torch.equal(weight, whole[name])


def test_an_empty_folder_is_filled_and_another_is_an_error(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "meta")
    (tmp_path / "empty").mkdir()
    open_checkpoint(write(made, tmp_path / "empty", "int8"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for taken in (tmp_path / "empty", next(iter(before))):
        with pytest.raises(ValueError, match="expected a new or an empty folder to write to; give another one"):
            write(made, taken, "int8")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_folder_may_be_the_current_one_or_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source(tmp_path / "source", "meta")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path(), tmp_path / "link"):
        open_checkpoint(write(made, folder, "int8"))
        assert not [path for path in folder.iterdir() if path.is_dir()]
    assert (tmp_path / "link").is_symlink()


def test_a_place_that_cannot_be_written_to_is_an_error_before_any_work(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "meta")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder that can be written to, and .*file cannot; give another"):
        write(made, tmp_path / "file" / "deeper" / "out", "int8", copy_others=_interrupted)


def test_columns_that_do_not_fill_words_are_an_error_before_any_work(tmp_path: Path) -> None:
    params = PARAMS | {"hidden_dim": 390}
    made = source(tmp_path / "source", "meta", params)
    with pytest.raises(ValueError, match=r"and layers\.0\.feed_forward\.w2\.weight has 390 columns, no .*: use fp8"):
        write(made, tmp_path / "out", "int8", copy_others=_interrupted)
    open_checkpoint(write(made, tmp_path / "out", "fp8"))


@pytest.mark.parametrize("target", ["new/deeper/out", "empty"])
@pytest.mark.parametrize("n_renames", [0, 1])
def test_an_error_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, n_renames: int
) -> None:
    made = source(tmp_path / "source", "meta")
    (tmp_path / "empty").mkdir()
    rename = os.rename
    done: list[Path] = []

    def failing(source: Path, place: Path) -> None:
        if Path(source).name != "0":  # a file of weights that gets its final name
            if len(done) == n_renames:
                raise KeyboardInterrupt
            done.append(place)
        rename(source, place)

    monkeypatch.setattr(os, "rename", failing)
    if target == "empty" or n_renames == 0:
        with pytest.raises(KeyboardInterrupt):
            write(made, tmp_path / target, "int8")
        assert {path.name for path in tmp_path.iterdir()} == {"source", "empty"}
        assert not list((tmp_path / "empty").iterdir())
    monkeypatch.undo()
    open_checkpoint(write(made, tmp_path / target, "int8"))


def _interrupted(folder: Path) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "meta")
    with pytest.raises(KeyboardInterrupt):
        write(made, tmp_path / "out", "int8", copy_others=_interrupted)
    name = "layers.1.feed_forward.w2.weight"
    damaged = write_meta(tmp_path / "damaged", PARAMS, WEIGHTS | {name: WEIGHTS[name] * torch.nan})
    with pytest.raises(ValueError, match="holds values that are not finite"):
        write(damaged, tmp_path / "out", "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "damaged"}


def test_a_killed_run_leaves_no_folder_that_opens(tmp_path: Path) -> None:
    made = source(tmp_path / "source", "meta")
    child = os.fork()
    if child == 0:
        try:
            vars(quantized_writer)["quantization_config"] = lambda *_: os._exit(9)  # after the weights
            write(made, tmp_path / "out", "int8")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = [path for path in tmp_path.iterdir() if path.name != "source"]
    assert left.name.startswith(".out.") and list(left.glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"config\.json: does not exist"):
        open_checkpoint(left)
    open_checkpoint(write(made, tmp_path / "out", "int8"))


def test_quantised_checkpoints_are_not_quantised_again(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    shape = linear_weights()[module].shape
    fields = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    write_folder(tmp_path / "gptq", fields, {module: gptq_parts((shape[0], shape[1]), 64, 0)[0]})
    with pytest.raises(ValueError, match=r"is quantised already \(int4 in groups of 64\), and rounding twice"):
        write(tmp_path / "gptq", tmp_path / "out", "int8")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    from tests.support.gguf_files import write as write_kind

    with pytest.raises(ValueError, match=r"is quantised already \(Q5_0\)"):
        write(write_kind(tmp_path, "Q5_0"), tmp_path / "out", "int8")
