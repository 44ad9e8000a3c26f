"""Writes a model's weights as a GGUF file, the format of llama.cpp.

Matrices keep the model's dtype. Vectors are float32, the only dtype of norms that llama.cpp multiplies by. Rows of q
and k stay in Meta's order: GGUF's llama architecture rotates adjacent pairs too. The file has the size of the
vocabulary but no tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSpec
from fastllama.rope import rope_frequencies

NO_TOKENIZER = "no_vocab"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(spec: ModelSpec, path: Path) -> None:
    """Write the weights of `spec` to `path`. One weight at a time is in memory."""
    import gguf

    args = spec.args
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_metadata(writer, spec)
    stored_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    # A file without this weight has a tied output.
    shapes = {name: shape for name, shape in args.shapes.items() if not (name == OUTPUT and args.tied_output)}
    if args.rope_type != "default":
        _add_tensor_info(writer, ROPE_FACTORS, (args.head_dim // 2,), torch.float32)
    for name, shape in shapes.items():
        stored_name = stored_names.get_name(name, try_suffixes=(".weight",))
        _add_tensor_info(writer, stored_name, shape, _stored_dtype(shape, spec.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if args.rope_type != "default":
        _write_tensor(writer, rope_factors(args))
    names = iter(shapes)
    for name, tensor in spec.tensors():
        if name in shapes:
            if name != next(names):
                raise ValueError(f"weights are not in the order of a forward pass: {name} came early")
            _write_tensor(writer, tensor.to(_stored_dtype(tensor.shape, spec.dtype)))
    writer.close()


def rope_factors(args: ModelArgs) -> Tensor:
    """(head_dim/2,) float32: what scaled rope divides each frequency by."""
    return rope_frequencies(replace(args, use_scaled_rope=False, rope_type="default")) / rope_frequencies(args)


def _stored_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if len(shape) == 1 else dtype


def _add_metadata(writer: Any, spec: ModelSpec) -> None:
    """The model's sizes, under GGUF's names."""
    import gguf

    args = spec.args
    file_types = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types[spec.dtype])
    writer.add_tokenizer_model(NO_TOKENIZER)
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)


def _add_tensor_info(writer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    import gguf
    import numpy as np

    stored_types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    # NumPy has no bfloat16. The last argument takes precedence over NumPy's type.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, stored_types[dtype])


def _write_tensor(writer: Any, tensor: Tensor) -> None:
    writer.write_tensor_data(tensor.cpu().contiguous().view(torch.uint8).numpy())
