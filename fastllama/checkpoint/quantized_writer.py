"""Writes a quantised copy of a checkpoint: a Hugging Face folder in the format of compressed-tensors.

    int8   pack-quantized, a scale per row     the package's W8A16
    fp8    float-quantized, a scale per row
    int4   pack-quantized, groups of columns with scale and zero point: W4A16, asymmetric; rounded by the weights'
           values, or by what their inputs are on a calibration text

All linear layers have the same scheme, as transformers dequantises no others while it loads. Activations are not
quantised. The embedding, norms and biases stay, and so does the output unless it is asked for.

The folder is written under another name beside its place, and then renamed. In a folder that is there already, the
files are moved into it at the end, config.json last. So one that was not finished does not open.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllama.args import OUTPUT_NAME
from fastllama.calibration import Calibration
from fastllama.checkpoint.base import Checkpoint
from fastllama.checkpoint.huggingface import CONFIG_NAME, PERMUTED_PARTS, huggingface_names
from fastllama.checkpoint.quantized_tensor import INT4_IN_WORD, in_transformers_row_order
from fastllama.checkpoint.quantized_writer_config import quantization_config
from fastllama.checkpoint.safetensors_files import INDEX_NAME, SINGLE_FILE_NAME
from fastllama.checkpoint.sharding import weight_specs
from fastllama.kernels.quantized import QuantizedWeight, Weight, pack_int4
from fastllama.quantization import NOT_QUANTIZED, Scheme, naming, quantized, scheme_of
from fastllama.torch_settings import with_default_settings

SHARD_BYTES = 2**31
DENSE_TYPES = ("F32", "F16", "BF16", "F64")  # of GGUF
SIGN_BIT = 0x80


@with_default_settings
def write_quantized(
    checkpoint: Checkpoint,
    folder: Path,
    quantize: str,
    *,
    with_output: bool,
    config: dict[str, Any],
    copy_others: Callable[[Path], None],
    calibration: Calibration | None = None,
    progress: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint's weights, quantised as a name of quantization.CHOICES says, to a new folder.

    with_output: quantise the output, too; one that is the embedding is then stored beside it.
    config: config.json without its quantization_config. copy_others: adds the other files to a folder.
    calibration: the text by which int4 is rounded, for other formats None.
    Host memory stays near one weight and one file of `shard_bytes`. With a calibration text come one layer in float32,
    the text's activations, and for a weight of IN columns some 40·IN² bytes, where the calibration computes.
    ValueError if the checkpoint is quantised already, or the folder is not empty; the folder is left as it was after
    any error.
    """
    _refuse_quantized(checkpoint)
    scheme = common_scheme(checkpoint, quantize)
    check_is_free(folder)
    exists = folder.exists()
    made = [] if exists else [path for path in folder.absolute().parents if not path.exists()]
    within = folder if exists else folder.parent
    within.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=within, prefix=f".{folder.name}."))
    try:
        copy_others(place)
        shards = _Shards(place, shard_bytes)
        for name, tensor in _tensors(checkpoint, scheme, with_output, calibration, progress):
            shards.add(name, tensor)
        shards.finish()
        config = config | {"tie_word_embeddings": checkpoint.params["tied_output"] and not with_output}
        config |= {"quantization_config": quantization_config(scheme, with_output)}
        (place / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        place.chmod(0o755)  # mkdtemp makes it private
        _move(place, folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # another program has put something there
            for path in made:
                path.rmdir()
        raise


def _move(place: Path, folder: Path) -> None:
    """Give a folder its name, or move its files into the one of that name, config.json last, all or none."""
    if not folder.exists():
        os.rename(place, folder)
        return
    paths = sorted(place.iterdir(), key=lambda path: path.name == CONFIG_NAME)
    try:
        for path in paths:
            os.rename(path, folder / path.name)
    except BaseException:
        for path in paths:
            moved = folder / path.name
            shutil.rmtree(moved) if moved.is_dir() else moved.unlink(missing_ok=True)
        raise
    place.rmdir()


def check_is_free(folder: Path) -> None:
    """Raise ValueError unless the folder is empty, or can be made."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or an empty folder to write to; give another one, or empty it")
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not (os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"{folder}: expected a folder that can be written to, and {above} cannot; give another one")


def common_scheme(checkpoint: Checkpoint, quantize: str) -> Scheme:
    """The scheme of all linear layers: int4's groups are the largest allowed that divides the columns of each.

    ValueError if a layer's columns fit no group, or int8's words.
    """
    specs = [spec for spec in weight_specs(checkpoint.params) if not spec.name.endswith((*NOT_QUANTIZED, OUTPUT_NAME))]
    schemes = [scheme_of(quantize, spec.name, spec.shape[1]) for spec in specs]
    for spec, scheme in zip(specs, schemes, strict=True):
        if scheme is not None and scheme.format == "int8" and spec.shape[1] % torch.int32.itemsize:
            raise ValueError(
                f"int8 is stored in words of 32 bits, and {spec.name} has {spec.shape[1]} columns, no multiple of 4: "
                "use fp8"
            )
    return min((scheme for scheme in schemes if scheme), key=lambda scheme: scheme.group_size)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    kinds = checkpoint.precisions or [kind for kind in checkpoint.bytes_by_type if kind not in DENSE_TYPES]
    if kinds:
        raise ValueError(
            f"{checkpoint.path}: is quantised already ({', '.join(kinds)}), and rounding twice loses more: "
            "use the original weights"
        )


def _tensors(
    checkpoint: Checkpoint,
    scheme: Scheme,
    with_output: bool,
    calibration: Calibration | None,
    progress: bool | None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that is stored."""
    params = checkpoint.params
    dense = checkpoint.dense_tensors(progress=progress)
    weights: Iterable[tuple[str, Weight]] = dense
    if calibration is not None:
        weights = calibration.rounded(dense, scheme.group_size)
    for name, weight in weights:
        if name == OUTPUT_NAME and params["tied_output"] and not with_output:
            continue
        stays = name.endswith(NOT_QUANTIZED) or (name == OUTPUT_NAME and not with_output)
        if isinstance(weight, Tensor) and not stays:
            with naming(name):
                weight = quantized(weight, scheme, integer_zeros=True)
        if any(f".{part}." in name for part in PERMUTED_PARTS):
            weight = in_transformers_row_order(weight, params["head_dim"])
        (theirs,) = huggingface_names([name]).values()
        if isinstance(weight, Tensor):
            yield theirs, weight.contiguous()
        else:
            module = theirs.removesuffix(".weight")
            yield from ((f"{module}.{part}", tensor) for part, tensor in _stored(weight).items())


def _stored(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantised module."""
    if weight.format == "fp8":
        return {"weight": weight.values.view(torch.float8_e4m3fn), "weight_scale": weight.scales}
    values = weight.values
    if weight.format == "int8":
        values = values.view(torch.uint8).bitwise_xor(SIGN_BIT)
    parts = {
        "weight_packed": values.view(torch.int32),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.offsets is not None:
        padded = torch.nn.functional.pad(weight.offsets, (0, 0, 0, -weight.shape[0] % INT4_IN_WORD))
        words = pack_int4(padded.T).flatten().view(torch.int32).view(padded.shape[1], -1)
        parts["weight_zero_point"] = words.T.contiguous()
    return parts


class _Shards:
    """Writes tensors to files of at most a number of bytes, but for larger tensors."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names of tensors
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        waiting = sum(one.nbytes for one in self._waiting.values())
        if self._waiting and waiting + tensor.nbytes > self._shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write the last file, give all their names, and write the index."""
        self._write()
        count = len(self._files)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        names = names if count > 1 else [SINGLE_FILE_NAME]
        for number, name in enumerate(names):
            os.rename(self._folder / str(number), self._folder / name)
        if count > 1:
            files = {tensor: name for name, tensors in zip(names, self._files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self._total}, "weight_map": files}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        path = self._folder / str(len(self._files))
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except Exception as error:  # safetensors has its own class of errors, for a full disk too
            raise ValueError(f"{path.parent}: weights cannot be written ({error})") from error
        path.chmod(0o644)
        self._files.append(list(self._waiting))
        self._waiting = {}
