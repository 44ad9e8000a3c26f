"""Meta's own Transformer, from the package llama-models, as a peer.

The loop is the one that the reference's `generate` runs for greedy prompts: prefill up to the end of the shortest
prompt, then one position a step, the prompt's token or an argmax, and a look for stop tokens.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import resolved
from fastllama.benchmarks.peers.worker import Generate, main, model_of, scores_of
from fastllama.benchmarks.runner import Run
from fastllama.benchmarks.timing import synchronize

META_ROPE_FACTOR = 8


def refusal(args: ModelArgs) -> str | None:
    """Why Meta's published code cannot run this model, or None when it can."""
    _, head_dim, _ = resolved(args)
    if head_dim * args.n_heads != args.dim:
        return (
            f"Meta's code needs head_dim = dim / n_heads, and this model has {head_dim} for {args.dim} / {args.n_heads}"
        )
    if args.use_scaled_rope and args.rope_scaling_factor != META_ROPE_FACTOR:
        return f"Meta's code scales rope by {META_ROPE_FACTOR} only, and this model by {args.rope_scaling_factor}"
    return None


def build(request: dict[str, Any]) -> Generate:
    """Meta's Transformer holding the weights that `request` describes."""
    from fairscale.nn.model_parallel import initialize as model_parallel
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    source, device, dtype = model_of(request)
    args = source.args(request["max_batch_size"], request["max_seq_len"])
    n_kv_heads, _, hidden_dim = resolved(args)
    # A file as the meeting point of the one process: unlike a port, nobody else can have it.
    meeting = Path(request["folder"], "process_group").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
    meta_args = MetaArgs(
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=args.vocab_size,
        # Rounding half the width up to a multiple of the width gives exactly the width, whatever produced it.
        multiple_of=hidden_dim,
        ffn_dim_multiplier=hidden_dim / (2 * int(8 * args.dim / 3)),
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        use_scaled_rope=args.use_scaled_rope,
        max_batch_size=args.max_batch_size,
        max_seq_len=args.max_seq_len,
    )
    weights = dict(source.tensors(args, device, dtype))
    model: torch.nn.Module = MetaTransformer(meta_args).to(device=device, dtype=dtype)
    model.load_state_dict(weights)
    del weights
    model.eval()
    return partial(generate, model)


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each of `prompts`, as the reference's loop makes them."""
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + steps
    tokens = torch.full((len(prompts), total), -1, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long, device=device)
    is_prompt = tokens >= 0
    stop_tokens = torch.tensor([-1], device=device)  # matches nothing, so that lengths are fixed; the test for it stays
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    seconds: list[float] = []
    logprobs: list[list[float]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    previous = 0
    synchronize(device)
    start = time.perf_counter()
    for current in range(min(lengths), total):
        logits = model(tokens[:, previous:current], previous)[:, -1]
        chosen = torch.where(is_prompt[:, current], tokens[:, current], torch.argmax(logits, dim=-1))
        tokens[:, current] = chosen
        finished |= ~is_prompt[:, current] & torch.isin(chosen, stop_tokens)
        previous = current
        if bool(finished.all()):
            break
        synchronize(device)
        if current >= max(lengths):  # by now every row has its token of this step
            seconds.append(time.perf_counter() - start)
        if with_logprobs:
            for row, (score, margin) in enumerate(zip(*scores_of(logits, chosen), strict=True)):
                if lengths[row] <= current < lengths[row] + steps:
                    logprobs[row].append(score)
                    margins[row].append(margin)
    generated = [row[length : length + steps] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    return Run(generated, seconds, logprobs, margins) if with_logprobs else Run(generated, seconds)


if __name__ == "__main__":
    sys.exit(main(build))
