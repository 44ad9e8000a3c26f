"""Load a model and its tokenizer. All checks are made before memory is allocated."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastllama import memory_plan, validate
from fastllama.args import ModelArgs
from fastllama.chat_format import Formatter, choose_format
from fastllama.checkpoint import Checkpoint, open_checkpoint
from fastllama.checkpoint.vocabulary import vocabulary_mismatch
from fastllama.distributed import model_parallel
from fastllama.kernels import select
from fastllama.kernels.quantized import Weight
from fastllama.model import Transformer
from fastllama.quantization import check_quantize
from fastllama.rope import check_angles
from fastllama.tokenizer_base import BaseTokenizer
from fastllama.tokenizer_open import open_tokenizer
from fastllama.tokenizer_search import find_tokenizer_file
from fastllama.vocabulary_difference import first_difference

logger = logging.getLogger(__name__)

MAX_SEQ_LEN = 8192
MAX_SEQ_LEN_SCALED_ROPE = 131072
AdapterFolders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """What `load` returns."""

    model: Transformer
    tokenizer: BaseTokenizer
    formatter: Formatter
    draft: Transformer | None


def load(
    ckpt_dir: str,
    tokenizer_path: str | None,
    *,
    max_seq_len: int,
    max_batch_size: int,
    cache_tokens: int | None,
    model_parallel_size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    backend: str | None,
    quantize: str | None,
    rope_scaling_factor: float | None,
    adapter: AdapterFolders,
    chat_template: str | os.PathLike[str] | None,
    template_args: Mapping[str, Any] | None,
    draft: str | os.PathLike[str] | None = None,
    n_guesses: int | None = 0,
) -> Loaded:
    """The model, tokenizer, chat format and draft model of `Llama.build`, with its arguments and errors.

    n_guesses: of a row, that a decode step checks; None: as many as pay off. If several processes share the model, an
    error in one while it reads and places the weights is raised in all.
    """
    start = time.perf_counter()
    max_seq_len = _check_max_seq_len(max_seq_len, MAX_SEQ_LEN_SCALED_ROPE, " (8192 without scaled rope)")
    device = choose_device(device)
    place: dict[str, Any] = {"device": device, "dtype": choose_dtype(dtype, device), "backend": backend}
    select.backend(backend, device)  # raises an error before anything is read
    group = model_parallel.model_group(model_parallel_size, device)
    sizes = max_seq_len, max_batch_size, cache_tokens
    with group.propagate_errors(), memory_plan.explain_out_of_memory(device):
        tokenizer_path = ckpt_dir if tokenizer_path is None else tokenizer_path
        _check_paths(ckpt_dir, tokenizer_path, draft)
        checkpoint = open_checkpoint(ckpt_dir, _adapter_folders(adapter))
        args, tokenizer = _args_and_tokenizer(checkpoint, tokenizer_path, rope_scaling_factor, sizes)
        check_quantize(quantize, args.split(group.size), device, checkpoint.schemes(group.size))
        formatter = _formatter(checkpoint, tokenizer, tokenizer_path, chat_template, template_args)
        opened = [_Opened(checkpoint, args, quantize)]
        if draft is not None:
            opened.append(_open_draft(draft, tokenizer, sizes, group.size))
        _check_memory(opened, place["dtype"], device, group.size, n_guesses)
        weights = [one.weights(group) for one in opened]
    with group.propagate_errors(), memory_plan.explain_out_of_memory(device):
        models: list[Transformer] = []
        for one, tensors in zip(opened, weights, strict=True):
            models.append(Transformer(one.args, quantize=one.quantize, init_weights=False, group=group, **place))
            models[-1].load_tensors(tensors)
    logger.info("loaded %s in %.2f seconds", ckpt_dir, time.perf_counter() - start)
    return Loaded(models[0], tokenizer, formatter, models[1] if draft is not None else None)


class _Opened(NamedTuple):
    """A checkpoint whose configuration was read."""

    checkpoint: Checkpoint
    args: ModelArgs
    quantize: str | None

    def weights(self, group: model_parallel.Group) -> Iterator[tuple[str, Weight]]:
        """This process's weights, read as they are taken."""
        progress = None if model_parallel.is_first_process() else False
        return self.checkpoint.tensors(group.rank, group.size, progress=progress)


def _open_draft(
    path: str | os.PathLike[str], tokenizer: BaseTokenizer, sizes: tuple[int, int, int | None], n_processes: int
) -> _Opened:
    """The draft model's checkpoint. Raises as for the model itself, and ValueError for another vocabulary."""
    try:
        folder = os.fspath(path)
        checkpoint = open_checkpoint(folder, [])
        args, own = _args_and_tokenizer(checkpoint, folder, None, sizes)
        args.split(n_processes)
        if difference := first_difference(tokenizer, own):
            raise ValueError(f"its vocabulary is another one: {difference}")
    except AssertionError as error:
        raise AssertionError(f"the draft model {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"the draft model {path}: {error}") from error
    return _Opened(checkpoint, args, None)


def _check_memory(
    opened: Sequence[_Opened], dtype: torch.dtype, device: torch.device, n_processes: int, n_guesses: int | None
) -> None:
    """Raise DoesNotFit if the model does not fit the free memory beside its draft model."""
    free, limit = memory_plan.free_memory(device), memory_plan.free_memory_and_limit(device).limit
    model, *drafts = opened
    for draft in drafts:
        stored = draft.checkpoint.schemes(n_processes)
        needed = memory_plan.plan_memory(
            draft.args,
            dtype,
            draft.args.max_batch_size,
            draft.args.max_seq_len,
            n_processes=n_processes,
            stored=stored,
            n_guesses=None,
        ).total
        if needed > free:
            sizes = f"{needed / memory_plan.GIB:.2f} GiB and {free / memory_plan.GIB:.2f} GiB are free {limit}"
            raise memory_plan.DoesNotFit(
                f"the draft model alone needs {sizes}: use a smaller one, or none, or lower max_seq_len"
            )
        free, limit = free - needed, f"{limit} beside the draft model's {needed / memory_plan.GIB:.2f} GiB"
    memory_plan.check_fits(
        model.args,
        dtype,
        free,
        limit=limit,
        n_processes=n_processes,
        quantize=model.quantize,
        stored=model.checkpoint.schemes(n_processes),
        n_guesses=n_guesses,
    )


def _args_and_tokenizer(
    checkpoint: Checkpoint,
    tokenizer_path: str,
    rope_scaling_factor: float | None,
    cache: tuple[int, int, int | None],
) -> tuple[ModelArgs, BaseTokenizer]:
    """The model's arguments and its tokenizer. Raises AssertionError if they do not fit together."""
    fields = dict(checkpoint.params)
    if rope_scaling_factor is not None:
        fields.update(use_scaled_rope=True, rope_type="llama3", rope_scaling_factor=rope_scaling_factor)
    max_seq_len, max_batch_size, cache_tokens = cache
    args = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, cache_tokens=cache_tokens, **fields)
    check_angles(args)
    if args.rope_type == "default":
        _check_max_seq_len(max_seq_len, MAX_SEQ_LEN, " for a checkpoint without scaled rope")
    tokenizer = open_tokenizer(tokenizer_path, llama31=bool(checkpoint.params["use_scaled_rope"]))
    if complaint := vocabulary_mismatch(checkpoint, tokenizer_path, tokenizer.n_words):
        raise AssertionError(complaint)
    tokenizer.n_rows = args.vocab_size
    tokenizer.stop_tokens |= set(checkpoint.stop_token_ids)
    return args, tokenizer


def _formatter(
    checkpoint: Checkpoint,
    tokenizer: BaseTokenizer,
    tokenizer_path: str,
    chat_template: str | os.PathLike[str] | None,
    template_args: Mapping[str, Any] | None,
) -> Formatter:
    """The chat format; templates are in the checkpoint's folder, or beside the tokenizer."""
    folders = [checkpoint.path, find_tokenizer_file(tokenizer_path).parent]
    is_meta = checkpoint.format == "meta"
    return choose_format(tokenizer, folders, is_meta=is_meta, chosen=chat_template, template_args=template_args)


def choose_device(value: torch.device | str | None) -> torch.device:
    """The given device. None means this process's GPU, as torchrun or CUDA assigns it, or the CPU if there is none.

    Raises ValueError for a device that is neither CUDA nor a CPU, or that this machine does not have.
    """
    if value is None:
        value = torch.device("cuda", model_parallel.gpu_index()) if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:N", got {value!r}') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:N", got {value!r}')
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", model_parallel.gpu_index())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {value!r} does not exist: torch sees {torch.cuda.device_count()} GPUs; leave device out"
        )
    return device


def choose_dtype(value: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The given dtype. None means bfloat16 on CUDA (float16 if the GPU lacks it), float32 on a CPU.

    Raises ValueError for any dtype other than these three.
    """
    if value is None:
        if device.type == "cpu":
            return torch.float32
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    dtype = DTYPES.get(value) if isinstance(value, str) else value
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {value!r}")
    return dtype


def _check_max_seq_len(value: object, most: int, where: str) -> int:
    try:
        return validate.whole_number("max_seq_len", value, 1, most)
    except ValueError as error:
        raise AssertionError(f"{error}{where}") from None


def _adapter_folders(adapter: AdapterFolders) -> list[str | os.PathLike[str]]:
    """The folders of `adapter=` as a list."""
    if adapter is None:
        return []
    folders = [adapter] if isinstance(adapter, str | os.PathLike) else adapter
    if not isinstance(folders, Sequence) or not all(isinstance(folder, str | os.PathLike) for folder in folders):
        raise ValueError(f"adapter must be a folder or a list of folders, got {adapter!r}")
    return list(folders)


def _check_paths(ckpt_dir: object, tokenizer_path: object, draft: object) -> None:
    for name, path in (
        ("ckpt_dir", ckpt_dir),
        ("tokenizer_path", tokenizer_path),
        ("draft", "." if draft is None else draft),
    ):
        if not isinstance(path, str | os.PathLike) or (name == "draft" and path == ""):
            raise ValueError(f"{name} must be a path, got {path!r}")
    if not os.path.exists(str(tokenizer_path)) and os.path.isdir(str(ckpt_dir)):
        raise AssertionError(f"the tokenizer file {str(tokenizer_path)!r} does not exist")
