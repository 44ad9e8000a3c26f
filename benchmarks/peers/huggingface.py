"""Hugging Face's LlamaForCausalLM as a peer: its own `generate`, eagerly, or with a static cache and torch.compile.

Prompts of different lengths are padded on the left, as its documentation says to.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import resolved
from fastllama.benchmarks.peers.worker import Generate, compile_or_fail, main, model_of, scores_of
from fastllama.benchmarks.runner import Run
from fastllama.benchmarks.timing import synchronize
from fastllama.checkpoint.huggingface import PERMUTED_PARTS, huggingface_names

PAD = 0


def build(request: dict[str, Any]) -> Generate:
    """LlamaForCausalLM holding the weights that `request` describes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source, device, dtype = model_of(request)
    args = source.args(request["max_batch_size"], request["max_seq_len"])
    n_kv_heads, head_dim, hidden_dim = resolved(args)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters=_rope(args),
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=args.tied_output,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict(dict(_weights(args, source.tensors(args, torch.device("cpu"), dtype))), strict=False)
    # The table of angles is no weight: it is made again where the module was empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model = model.to(device).eval()
    compiled = request["name"] == "transformers-compiled"
    if compiled:
        compile_or_fail()
        model.forward = torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else None)
    return partial(generate, model, compiled)


def _rope(args: ModelArgs) -> dict[str, Any]:
    if not args.use_scaled_rope:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": args.rope_theta,
        "factor": args.rope_scaling_factor,
        "low_freq_factor": args.rope_low_freq_factor,
        "high_freq_factor": args.rope_high_freq_factor,
        "original_max_position_embeddings": args.rope_original_max_seq_len,
    }


def _weights(args: ModelArgs, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Meta's weights in transformers' names and its order of q and k's rows: half after half, not pair after pair."""
    theirs = huggingface_names(args.n_layers)
    _, head_dim, _ = resolved(args)
    for name, weight in tensors:
        if any(part in name for part in PERMUTED_PARTS):
            pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        yield theirs[name], weight


@torch.inference_mode()
def generate(model: Any, static: bool, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each of `prompts`, by the model's own `generate`."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    device = model.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    seconds: list[float] = []

    class Clock(StoppingCriteria):
        """Is asked after each step whether to stop; only looks at the time."""

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)

    synchronize(device)
    start = time.perf_counter()
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
    if not with_logprobs:
        return Run(tokens.tolist(), seconds)
    logprobs: list[list[float]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    for step, logits in enumerate(found.logits):
        for row, (score, margin) in enumerate(zip(*scores_of(logits, tokens[:, step]), strict=True)):
            logprobs[row].append(score)
            margins[row].append(margin)
    return Run(tokens.tolist(), seconds, logprobs, margins)


if __name__ == "__main__":
    sys.exit(main(build))
