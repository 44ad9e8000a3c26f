"""gpt-fast as a peer, from a checkout that the user names: its model and its step, greedy.

The step is compiled as its own program compiles it, but on a CPU, where torch 2.13's compiler refuses its attention. It
takes equally long prompts only, and returns probabilities, of which the likeliest token is taken here.
"""

import importlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllama.args import ModelArgs
from fastllama.benchmarks.models import resolved
from fastllama.benchmarks.peers.worker import Generate, compile_or_fail, main, model_of
from fastllama.benchmarks.runner import Run
from fastllama.benchmarks.timing import synchronize

FILES = ("model.py", "generate.py")


def missing(checkout: str | None) -> str | None:
    """Why there is no gpt-fast at this path, or None when there is."""
    if checkout is None:
        return "no checkout of gpt-fast named: --gpt_fast DIR"
    lacking = [name for name in FILES if not Path(checkout, name).is_file()]
    return f"{checkout} is no checkout of gpt-fast: it lacks {' and '.join(lacking)}" if lacking else None


def refusal(args: ModelArgs) -> str | None:
    """Why gpt-fast cannot run this model, or None when it can."""
    _, head_dim, _ = resolved(args)
    if head_dim * args.n_heads != args.dim:
        return f"gpt-fast needs head_dim = dim / n_heads, and this model has {head_dim} for {args.dim} / {args.n_heads}"
    return None


def build(request: dict[str, Any]) -> Generate:
    """gpt-fast's Transformer holding the weights that `request` describes."""
    source, device, dtype = model_of(request)
    sys.path.insert(0, request["gpt_fast"])
    theirs, program = importlib.import_module("model"), importlib.import_module("generate")
    args = source.args(request["max_batch_size"], request["max_seq_len"])
    n_kv_heads, head_dim, hidden_dim = resolved(args)
    config = theirs.ModelArgs(
        block_size=args.max_seq_len,
        vocab_size=args.vocab_size,
        n_layer=args.n_layers,
        n_head=args.n_heads,
        n_local_heads=n_kv_heads,
        dim=args.dim,
        intermediate_size=hidden_dim,
        head_dim=head_dim,
        rope_base=args.rope_theta,
        norm_eps=args.norm_eps,
        rope_scaling=_rope_scaling(args),
    )
    with torch.device("meta"):
        model = theirs.Transformer(config)
    model.load_state_dict(dict(source.tensors(args, device, dtype)), assign=True)
    model = model.to(device=device, dtype=dtype).eval()
    compile_or_fail()
    step = program.decode_one_token
    if device.type == "cuda":
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    return partial(generate, model, program, step, args.max_seq_len)


def _fit(model: Any, rows: int, max_seq_len: int) -> None:
    """Caches of exactly so many rows: it attends to all that there are."""
    if model.max_batch_size != rows:
        model.max_batch_size = -1  # or a smaller batch would keep the larger caches
        with torch.device(model.output.weight.device):
            model.setup_caches(max_batch_size=rows, max_seq_length=max_seq_len)


def _rope_scaling(args: ModelArgs) -> dict[str, Any] | None:
    if not args.use_scaled_rope:
        return None
    return {
        "factor": args.rope_scaling_factor,
        "low_freq_factor": args.rope_low_freq_factor,
        "high_freq_factor": args.rope_high_freq_factor,
        "original_max_position_embeddings": args.rope_original_max_seq_len,
    }


@torch.inference_mode()
def generate(
    model: Any,
    program: Any,
    step: Any,
    max_seq_len: int,
    prompts: list[list[int]],
    steps: int,
    with_logprobs: bool,
) -> Run:
    """`steps` greedy tokens for each of the equally long `prompts`."""
    _fit(model, len(prompts), max_seq_len)
    ids = torch.tensor(prompts)
    device = model.output.weight.device
    length, longest = ids.shape[1], model.max_seq_length
    seconds: list[float] = []
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]

    def keep(probs: Tensor) -> Tensor:
        """The likeliest tokens (B, 1) of probs (B, V), once they are there."""
        chosen = probs.argmax(-1, keepdim=True)
        for row, token in enumerate(chosen[:, 0].tolist()):
            tokens[row].append(token)
        seconds.append(time.perf_counter() - start)
        if with_logprobs:
            logs = probs.topk(2, -1).values.float().log()
            for row, (score, margin) in enumerate(
                zip(logs[:, 0].tolist(), (logs[:, 0] - logs[:, 1]).tolist(), strict=True)
            ):
                logprobs[row].append(score)
                margins[row].append(margin)
        return chosen

    synchronize(device)
    start = time.perf_counter()
    mask = program.create_block_mask(program.causal_mask, 1, 1, length, longest, device=device)
    logits = model(mask, ids.to(device), torch.arange(length, device=device))
    newest = keep(program.logits_to_probs(logits[:, -1]))
    mask = program.create_block_mask(program.causal_mask, 1, 1, longest, longest, device=device)
    position = torch.tensor([length], device=device)
    for _ in range(steps - 1):
        _, probs = step(model, newest.clone(), position, mask)
        newest = keep(probs)
        position += 1
    return Run(tokens, seconds, logprobs, margins) if with_logprobs else Run(tokens, seconds)


if __name__ == "__main__":
    sys.exit(main(build))
