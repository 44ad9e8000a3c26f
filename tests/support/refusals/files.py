"""Files that are not a checkpoint that fastllama reads, or that do not say which one is meant."""

import argparse
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.checkpoint import open_checkpoint
from tests.support.bad_checkpoints import PARAMS, WEIGHTS, edit_shard, huggingface, meta
from tests.support.checkpoints import huggingface_weights, write_tokenizer
from tests.support.refusals.case import MODEL, Refusal, build

# A file's name for every pattern of another format, and what it is.
OTHER_FORMATS = {
    "pytorch_model.bin": "transformers' pickled weights",
    "model-00001-of-00002.bin": "pickled weights under another name",
    "__0_0.distcp": "torch's distributed checkpoint",
    "global_step300": "DeepSpeed's checkpoint",
    "model.onnx": "an ONNX export",
    "tf_model.h5": "TensorFlow's weights",
    "flax_model.msgpack": "Flax's weights",
    "llama.nemo": "NeMo's archive",
    "epoch=3.ckpt": "a checkpoint of Lightning",
    "hf_model_0001_0.pt": "torch files of unknown content",
    "weights.npz": "MLX's or numpy's weights",
}
CACHE = Path("model/models--meta-llama--Llama-3.2-1B/snapshots/4e20de3")


def _touch(*names: str) -> None:
    for name in names:
        (MODEL / name).write_bytes(b"")


def _huggingface(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return huggingface(folder, **fields)


def _two_sets() -> None:
    weights = (_huggingface(MODEL) / "model.safetensors").read_bytes()
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model-00001-of-00001"):
        (MODEL / f"{name}.safetensors").write_bytes(weights)
    (MODEL / "model.safetensors").unlink()


def _params_beside_safetensors() -> None:
    (meta(MODEL) / "consolidated.00.pth").unlink()
    (_huggingface(MODEL) / "config.json").unlink()


def _renamed(first: str, second: str) -> None:
    meta(MODEL, shards=2)
    for number, name in enumerate((first, second)):
        (MODEL / f"consolidated.{number:02d}.pth").rename(MODEL / name)


def _saved(edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_shard(meta(MODEL), edit)


def _older_torch() -> None:
    torch.save(WEIGHTS, meta(MODEL) / "consolidated.00.pth", _use_new_zipfile_serialization=False)


def _compressed() -> None:
    path = meta(MODEL) / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _without(write: Callable[[Path], Path], name: str) -> None:
    (write(MODEL) / name).unlink()


def _several_folders() -> None:
    _huggingface(MODEL / "checkpoint-100")
    _huggingface(MODEL / "checkpoint-200")


missing = partial(Refusal, error=AssertionError)  # Meta's code asserts that there is a checkpoint
CASES = [
    *(missing(f"{what}: `{name}`", partial(_touch, name, "config.json")) for name, what in OTHER_FORMATS.items()),
    missing("a file of a folder", lambda: meta(MODEL), lambda: open_checkpoint(MODEL / "consolidated.00.pth")),
    missing("a folder of checkpoints, as trainers write it", _several_folders),
    missing("the folder of a Hugging Face cache", lambda: _huggingface(CACHE)),
    missing("a folder of something else", lambda: _touch("notes.txt", "tokenizer.json")),
    Refusal("Meta's weights without `params.json`", partial(_without, meta, "params.json")),
    Refusal("safetensors without `config.json`", partial(_without, _huggingface, "config.json")),
    Refusal("safetensors beside `params.json`, without `config.json`", _params_beside_safetensors),
    Refusal("shards without numbers in their names", partial(_renamed, "a.pth", "b.pth")),
    Refusal("safetensors of two checkpoints in one folder", _two_sets),
    Refusal("a `.pth` with a pickled object", partial(_saved, lambda tensors: {**tensors, "a": argparse.Namespace()})),
    Refusal("a `.pth` of a trainer, with more than weights", partial(_saved, lambda tensors: {"model": tensors})),
    Refusal("a `.pth` of torch before 1.6", _older_torch),
    Refusal("a compressed `.pth`", _compressed),
    Refusal(
        "transformers' names in a `.pth`",
        partial(_saved, lambda tensors: huggingface_weights(PARAMS, tensors)),
    ),
    Refusal(
        "a number of processes that does not divide the model",
        lambda: write_tokenizer(meta(MODEL)),
        lambda: open_checkpoint(MODEL).dense_tensors(0, 3),
    ),
    missing(
        "another model's tokenizer",
        lambda: write_tokenizer(meta(MODEL).with_name("other"), n_ranks=300),
        partial(build, "other/tokenizer.model"),
    ),
    missing("a padded vocabulary in Meta's layout", lambda: write_tokenizer(meta(MODEL), n_ranks=300)),
    missing("tokens added to the tokenizer alone", lambda: write_tokenizer(meta(MODEL), n_ranks=350)),
]
