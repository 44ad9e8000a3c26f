"""Meta's checkpoints: params.json beside any number of `*.pth` files, each a slice of every weight.

A shard is a zip archive that torch maps into memory, so opening reads only the pickled table of contents, and that
through torch's restricted unpickler, which never runs what a file brings along.

How many shards there are, on which axis the embedding is cut (Llama 3: vocabulary, Llama 2: width) and whether kv heads
repeat (more shards than kv heads) is not written anywhere; the shapes tell.
"""

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastllama.args import IGNORED_NAMES, ffn_width
from fastllama.checkpoint.base import (
    Checkpoint,
    check_dims,
    check_dtypes,
    check_names,
    check_shapes,
    dtype_name,
    file_sizes,
    head_dim_of,
    read_start,
)
from fastllama.checkpoint.fields import MOST_LAYERS, Fields, listing, shown
from fastllama.checkpoint.layout import EMBEDDING_NAME, OUTPUT_NAME, Stored, Weight, names, weights

logger = logging.getLogger(__name__)

PARAMS_NAME = "params.json"
SHARD_PATTERN = "*.pth"
ZIP_SIGNATURE = b"PK\x03\x04"
NUMBERED_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
# A buffer that older files carry; it follows from the parameters.

# Meta's defaults for fields that params.json may leave out.
MULTIPLE_OF = 256
NORM_EPS = 1e-5
ROPE_THETA = 500000.0

META_FIELDS = frozenset(
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    | {"norm_eps", "rope_theta", "use_scaled_rope"}
)
# What our ModelArgs has beyond Meta's, so that a params.json may state it.
OWN_FIELDS = frozenset({"head_dim", "hidden_dim", "tied_output"})
ROPE_NUMBERS = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
ROPE_INTEGERS = ("rope_original_max_seq_len",)
# Limits of a run rather than of the weights: the caller of Llama.build sets them.
IGNORED_FIELDS = frozenset({"max_batch_size", "max_seq_len"})
QUANTISED_FIELDS = ("quantization_args", "lora_args")
KNOWN_FIELDS = META_FIELDS.union(OWN_FIELDS, ROPE_NUMBERS, ROPE_INTEGERS, IGNORED_FIELDS, QUANTISED_FIELDS)
VISION_PREFIX = "vision_"

Shard = dict[str, torch.Tensor]


def shard_files(folder: Path) -> list[Path]:
    """Every `*.pth` in a folder, sorted by name, as the reference takes them."""
    return sorted(folder.glob(SHARD_PATTERN))


def open_meta(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that holds params.json and `*.pth`; ValueError where anything is not as it must be."""
    fields = Fields.read(folder / PARAMS_NAME)
    params = _params(fields)
    files = shard_files(folder)
    _check_numbering(folder, files)
    shards = [_load_shard(path) for path in files]
    _check_agreement(files, shards)

    expected = names(params["n_layers"])
    if params["tied_output"] and OUTPUT_NAME not in shards[0]:
        expected.remove(OUTPUT_NAME)
    check_names(files[0], expected, shards[0])
    params["tied_output"] = params["tied_output"] or all(map(_is_tied, shards))
    embedding_axis = _resolve_vocabulary(folder, params, shards)

    stored, shapes = {}, {}
    for weight in weights(params):
        if weight.name not in shards[0]:
            continue
        axis = embedding_axis if weight.name == EMBEDDING_NAME else weight.axis
        pieces = _distinct_pieces(weight, axis, [shard[weight.name] for shard in shards])
        joined = list(pieces[0].shape)
        if axis is not None and len(joined) > axis:
            joined[axis] *= len(pieces)
        shapes[weight.name] = (weight.shape, joined)
        stored[weight.name] = Stored(pieces, axis or 0)
    check_shapes(folder, f"{PARAMS_NAME} asks for of {len(files)} joined shards", shapes)
    return Checkpoint(
        path=folder,
        format="meta",
        params=params,
        files=file_sizes(files),
        dtype=shards[0][EMBEDDING_NAME].dtype,
        stop_token_ids=(),
        stored=stored,
    )


def _params(fields: Fields) -> dict[str, Any]:
    """params.json as ModelArgs fields; vocab_size is -1 where only the embedding tells."""
    for key in QUANTISED_FIELDS:
        if fields.has(key):
            raise ValueError(f"{fields.path}: {key} marks a quantised checkpoint; use the original bfloat16 weights")
    if any(key.startswith(VISION_PREFIX) for key in fields.values):
        raise ValueError(f"{fields.path}: is a vision model; fastllama reads text models only")
    fields.refuse_unknown(KNOWN_FIELDS)

    dim, n_heads = fields.integer("dim"), fields.integer("n_heads")
    multiple_of, multiplier = fields.integer("multiple_of", MULTIPLE_OF), fields.number("ffn_dim_multiplier", 1.0)
    width = ffn_width(dim, multiplier, multiple_of)
    if not fields.has("hidden_dim") and not 1 <= width < 2**31:
        raise fields.error("ffn_dim_multiplier", f"a factor that gives a sensible width (this gives {shown(width)})")
    if not fields.has("rope_theta"):
        logger.warning("%s has no rope_theta; Llama 3's %.0f is used (Llama 2 needs 10000)", fields.path, ROPE_THETA)
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": fields.integer("n_layers", most=MOST_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("n_kv_heads", n_heads),
        "vocab_size": -1 if fields.values.get("vocab_size") == -1 else fields.integer("vocab_size", -1),
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier if fields.has("ffn_dim_multiplier") else None,
        "norm_eps": fields.number("norm_eps", NORM_EPS),
        "rope_theta": fields.number("rope_theta", ROPE_THETA),
        "use_scaled_rope": fields.flag("use_scaled_rope"),
        "head_dim": head_dim_of(fields, dim, n_heads),
        "hidden_dim": fields.integer("hidden_dim", width),
        "tied_output": fields.flag("tied_output"),
    }
    params |= {key: fields.number(key) for key in ROPE_NUMBERS if fields.has(key)}
    params |= {key: fields.integer(key) for key in ROPE_INTEGERS if fields.has(key)}
    check_dims(fields, params)
    return params


def _check_numbering(folder: Path, files: list[Path]) -> None:
    numbers = [int(match[1]) for path in files if (match := NUMBERED_SHARD.fullmatch(path.name))]
    if len(numbers) == len(files) and (missing := sorted(set(range(max(numbers))) - set(numbers))):
        absent = listing([f"consolidated.{number:02d}.pth" for number in missing])
        raise ValueError(f"{folder}: shards are missing: {absent}; download them")


def _load_shard(path: Path) -> Shard:
    """One file's tensors, mapped and checked one by one, without those that are ignored."""
    if read_start(path)[: len(ZIP_SIGNATURE)] != ZIP_SIGNATURE:
        raise ValueError(
            f"{path}: is not a zip archive as torch.save writes them; if it is a file of torch before 1.6, "
            "save it again: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        content = None if compressed else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and zipfile raise a dozen types for a damaged or hostile file
        raise ValueError(f"{path}: {_reason(error)}") from error
    if compressed:  # mapping takes the bytes as they lie, so torch would read these as numbers
        raise ValueError(f"{path}: its entries are compressed and cannot be mapped; pack it without compression")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of names and tensors, got a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: expected a flat dict of names and tensors, got {shown(name)} with a {type(value).__name__}"
            )
    shard = {name: value.detach() for name, value in content.items() if name not in IGNORED_NAMES}
    check_dtypes(path, {name: dtype_name(value.dtype) for name, value in shard.items()})
    hollow = [
        f"{name} {tuple(value.shape)}"
        for name, value in shard.items()
        if value.layout != torch.strided or value.device.type != "cpu" or not value.numel()
    ]
    if hollow:
        raise ValueError(f"{path}: expected dense tensors with data, got none in {listing(hollow)}")
    return shard


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        wanted = re.search(r"GLOBAL (\S{1,80})", text)
        what = f" ({wanted[1]})" if wanted else ""
        return f"refused, because it holds more than tensors{what} and nothing in it is executed"
    said = f"{type(error).__name__}: {shown(text.splitlines()[0] if text else '')}"
    return f"is truncated or damaged ({said}); download it again"


def _check_agreement(files: list[Path], shards: list[Shard]) -> None:
    """ValueError unless all shards hold the same names with the same shapes and dtypes."""
    first = shards[0]
    for path, shard in zip(files[1:], shards[1:], strict=True):
        if shard.keys() != first.keys():
            differ = listing(sorted(shard.keys() ^ first.keys()))
            raise ValueError(f"{path}: expected the same tensors as in {files[0].name}, they differ in {differ}")
        differ_in = [
            f"{name}: {tuple(first[name].shape)} {first[name].dtype} there, {tuple(value.shape)} {value.dtype} here"
            for name, value in shard.items()
            if value.shape != first[name].shape or value.dtype != first[name].dtype
        ]
        if differ_in:
            raise ValueError(f"{path}: expected the same shapes as in {files[0].name}, got {listing(differ_in)}")


def _is_tied(shard: Shard) -> bool:
    """Whether the output is the embedding itself: torch.save writes a shared storage once."""
    output, embedding = shard.get(OUTPUT_NAME), shard[EMBEDDING_NAME]
    if output is None:
        return True
    same_layout = output.shape == embedding.shape and output.stride() == embedding.stride()
    return same_layout and output.data_ptr() == embedding.data_ptr()


def _resolve_vocabulary(folder: Path, params: dict[str, Any], shards: list[Shard]) -> int:
    """Sets vocab_size where the file left it open, and returns the axis on which the embedding is cut."""
    shape, n_shards = tuple(shards[0][EMBEDDING_NAME].shape), len(shards)
    for axis, joined in _joinings(shape, n_shards):
        if joined[1] == params["dim"] and params["vocab_size"] in (-1, joined[0]):
            params["vocab_size"] = joined[0]
            return axis
    expected = ("V" if params["vocab_size"] == -1 else params["vocab_size"], params["dim"])
    raise ValueError(
        f"{folder}: {EMBEDDING_NAME}: expected ({expected[0]}, {expected[1]}) from {n_shards} shards, "
        f"got shards of {shape}; compare {PARAMS_NAME} and the number of files"
    )


def _joinings(shape: tuple[int, ...], n_shards: int) -> Iterator[tuple[int, tuple[int, int]]]:
    if len(shape) == 2:
        yield 0, (shape[0] * n_shards, shape[1])
        yield 1, (shape[0], shape[1] * n_shards)


def _distinct_pieces(weight: Weight, axis: int | None, pieces: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One piece where all shards hold the same; one per kv head where neighbouring shards share a head."""
    if axis is None:
        return (pieces[0],)
    shared_by = len(pieces) // weight.kv_heads if weight.kv_heads else 1
    if shared_by > 1 and pieces[0].shape == (weight.shape[0] // weight.kv_heads, weight.shape[1]):
        return tuple(pieces[::shared_by])
    return tuple(pieces)
