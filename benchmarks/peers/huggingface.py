"""Hugging Face's LlamaForCausalLM as a peer: its own `generate`, eagerly, or with a static cache and torch.compile.

Prompts of different lengths are padded on the left, as its documentation recommends.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.worker import (
    Generate,
    Recorder,
    compile_or_fail,
    rope_scaling,
    scores_of,
    unsupported_rope,
)
from fastllama.benchmarks.runners import Run
from fastllama.checkpoint.huggingface import PERMUTED_PARTS, huggingface_names

PAD = 0
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def unsupported(args: ModelArgs) -> str | None:
    """The reason why transformers cannot run this model, or None."""
    return unsupported_rope("transformers", args, ROPE_TYPES)


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """LlamaForCausalLM holding the weights of `spec`, compiled or not."""
    model = llama_model(spec)
    compiled = request["name"] == "transformers-compiled"
    if compiled:
        compile_or_fail()
        model.forward = torch.compile(model.forward, mode="reduce-overhead" if spec.device.type == "cuda" else None)
    return partial(generate, model, compiled)


def llama_model(spec: ModelSpec) -> Any:
    """LlamaForCausalLM holding the weights of `spec`."""
    from transformers import LlamaForCausalLM

    config = llama_config(spec.args, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(spec.dtype)
    model.load_state_dict(dict(huggingface_weights(replace(spec, device=torch.device("cpu")))), strict=False)
    # The table of angles is no weight: make it again, since the module was created empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.to(spec.device).eval()


def llama_config(args: ModelArgs, **fields: Any) -> Any:
    """The model's LlamaConfig, with further `fields`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": args.rope_type, "rope_theta": args.rope_theta, **rope_scaling(args)},
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=args.tied_output,
        attention_bias=args.attention_bias,
        mlp_bias=args.mlp_bias,
        **fields,
    )


def huggingface_weights(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The weights under transformers' names. Rows of q and k are reordered from adjacent pairs to two halves."""
    head_dim = spec.args.head_dim
    names = huggingface_names(spec.args.shapes)
    for name, weight in spec.tensors():
        if any(part in name for part in PERMUTED_PARTS):
            pairs = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        yield names[name], weight


@torch.inference_mode()
def generate(model: Any, static: bool, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each prompt, by the model's own `generate`."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    device = model.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    class Clock(StoppingCriteria):
        """Called after each step to decide whether to stop: records the time and never stops."""

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            recorder.end_step()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)

    recorder = Recorder(len(prompts), device, with_logprobs)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([Clock()]),
        return_dict_in_generate=True,
        output_logits=with_logprobs,
        **({"cache_implementation": "static"} if static else {}),
    )
    tokens = found.sequences[:, longest:]
    for step, logits in enumerate(found.logits if with_logprobs else ()):
        recorder.add_scores(*scores_of(logits, tokens[:, step]))
    return recorder.run(tokens.tolist())
