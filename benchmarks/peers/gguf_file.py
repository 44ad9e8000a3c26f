"""Writes a model's weights as a GGUF file, the format of llama.cpp.

Matrices keep the model's dtype, or are quantised by the package gguf: in Q8_0 where ours are int8, in Q4_0 where they
are int4. The embedding then keeps the dtype, and the output of a model in Q4_0 has Q8_0, as ours. Vectors are float32,
the only dtype of norms that llama.cpp multiplies by. Rows of q and k stay in Meta's order: GGUF's llama architecture
rotates adjacent pairs too. The file has the size of the vocabulary but no tokens.
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
EMBEDDING = "tok_embeddings.weight"
ROPE_FACTORS = "rope_freqs.weight"
FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
QUANTIZED_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "int4-g64": "Q4_0", "int4-g32": "Q4_0"}


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
        _add_tensor_info(writer, ROPE_FACTORS, (args.head_dim // 2,), "F32")
    for name, shape in shapes.items():
        stored_name = stored_names.get_name(name, try_suffixes=(".weight",))
        _add_tensor_info(writer, stored_name, shape, _stored_type(name, shape, spec))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if args.rope_type != "default":
        _write_tensor(writer, rope_factors(args), "F32")
    names = iter(shapes)
    for name, tensor in spec.tensors():
        if name in shapes:
            if name != next(names):
                raise ValueError(f"weights are not in the order of a forward pass: {name} came early")
            _write_tensor(writer, tensor, _stored_type(name, shapes[name], spec))
    writer.close()


def rope_factors(args: ModelArgs) -> Tensor:
    """(head_dim/2,) float32: what scaled rope divides each frequency by."""
    return rope_frequencies(replace(args, use_scaled_rope=False, rope_type="default")) / rope_frequencies(args)


def _stored_type(name: str, shape: tuple[int, ...], spec: ModelSpec) -> str:
    """GGUF's name of the type in which a weight is stored."""
    if len(shape) == 1:
        return "F32"
    if spec.quantize is None or name == EMBEDDING:
        return FLOAT_TYPES[spec.dtype]
    return "Q8_0" if name == OUTPUT else QUANTIZED_TYPES[spec.quantize]


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


def _add_tensor_info(writer: Any, name: str, shape: tuple[int, ...], stored_type: str) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[stored_type]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = gguf.quant_shape_to_byte_shape(shape, kind) if stored_type.startswith("Q") else shape
    n_bytes = torch.Size(shape).numel() // block_size * block_bytes
    # NumPy has no bfloat16. The last argument takes precedence over NumPy's type, and uint8 says that shapes are bytes.
    writer.add_tensor_info(
        name, stored, np.dtype(np.uint8 if stored_type.startswith("Q") else np.float32), n_bytes, kind
    )


def _write_tensor(writer: Any, tensor: Tensor, stored_type: str) -> None:
    import gguf

    if stored_type.startswith("Q"):
        writer.write_tensor_data(
            gguf.quants.quantize(tensor.float().cpu().numpy(), gguf.GGMLQuantizationType[stored_type])
        )
        return
    dtypes = {name: dtype for dtype, name in FLOAT_TYPES.items()}
    writer.write_tensor_data(tensor.to(dtypes[stored_type]).cpu().contiguous().view(torch.uint8).numpy())
