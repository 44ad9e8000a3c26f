"""Meta's own Transformer, from the package llama-models, as a peer.

The loop is the reference's greedy `generate`: prefill up to the end of the shortest prompt, then one position per step
(the prompt's token or the argmax) with a test for stop tokens.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.peers.worker import (
    Generate,
    Recorder,
    scores_of,
    unsupported_biases,
    unsupported_head_dim,
    unsupported_rope,
)
from fastllama.benchmarks.runners import Run

META_ROPE_FACTOR = 8
META_ROPE_TYPES = ("default", "llama3")


def unsupported(args: ModelArgs) -> str | None:
    """The reason why Meta's published code cannot run this model, or None."""
    code = "Meta's code"
    reason = unsupported_head_dim(code, args) or unsupported_biases(code, args)
    if (reason := reason or unsupported_rope(code, args, META_ROPE_TYPES)) is not None:
        return reason
    if args.use_scaled_rope and args.rope_scaling_factor != META_ROPE_FACTOR:
        return f"Meta's code scales rope by {META_ROPE_FACTOR} only, and this model by {args.rope_scaling_factor}"
    return None


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """Meta's Transformer holding the weights of `spec`."""
    from fairscale.nn.model_parallel import initialize as model_parallel
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    args = spec.args
    # A process group of one. It is initialised through a file, because a port could be in use.
    init_method = Path(request["folder"], "process_group").as_uri()
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
    meta_args = MetaArgs(
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        # Meta's code rounds half of hidden_dim up to a multiple of hidden_dim, which gives hidden_dim.
        multiple_of=args.hidden_dim,
        ffn_dim_multiplier=args.hidden_dim / (2 * int(8 * args.dim / 3)),
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        use_scaled_rope=args.use_scaled_rope,
        max_batch_size=args.max_batch_size,
        max_seq_len=args.max_seq_len,
    )
    weights = dict(spec.tensors())
    model: torch.nn.Module = MetaTransformer(meta_args).to(device=spec.device, dtype=spec.dtype)
    model.load_state_dict(weights)
    del weights
    model.eval()
    return partial(generate, model)


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each prompt, by the reference's loop."""
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + steps
    tokens = torch.full((len(prompts), total), -1, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long, device=device)
    is_prompt = tokens >= 0
    stop_tokens = torch.tensor([-1], device=device)  # equals no token: lengths are fixed, and the test still runs
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    previous = 0
    recorder = Recorder(len(prompts), device, with_logprobs)
    for current in range(min(lengths), total):
        logits = model(tokens[:, previous:current], previous)[:, -1]
        chosen = torch.where(is_prompt[:, current], tokens[:, current], torch.argmax(logits, dim=-1))
        tokens[:, current] = chosen
        finished |= ~is_prompt[:, current] & torch.isin(chosen, stop_tokens)
        previous = current
        if bool(finished.all()):
            break
        if current >= max(lengths):  # every row has its token of this step
            recorder.end_step()
        if with_logprobs:
            rows = [row for row, length in enumerate(lengths) if length <= current < length + steps]
            recorder.add_scores(*scores_of(logits, chosen), rows)
    generated = [row[length : length + steps] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return recorder.run(generated)
