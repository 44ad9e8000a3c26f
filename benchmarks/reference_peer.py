"""Meta's own Transformer, from the package llama-models, as a process that generates on request.

It runs apart so that neither side disturbs the other: fairscale wants a process group, both hold a thread pool and an
allocator. The first line on stdin describes the model, each later line a generation; each gets one line of JSON back.
The loop is the one that the reference's `generate` runs for equally long greedy prompts: prefill, then one token a
step, an argmax, and a look for stop tokens.

Run by `peers.ReferencePeer`, not by hand.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch

from fastllama.args import ModelArgs
from fastllama.benchmarks.measure import synchronize
from fastllama.benchmarks.models import ModelSource, Run, resolved

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


def build(request: dict[str, Any]) -> torch.nn.Module:
    """Meta's Transformer holding the weights that `request` describes."""
    from fairscale.nn.model_parallel import initialize as model_parallel
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    torch.set_num_threads(request["threads"])
    source = ModelSource(**request["source"])
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
    return model


@torch.inference_mode()
def generate(model: torch.nn.Module, prompts: list[list[int]], steps: int, with_logprobs: bool) -> Run:
    """`steps` greedy tokens for each of `prompts`, which are equally long, as the reference's loop makes them."""
    device = next(model.parameters()).device
    length = len(prompts[0])
    tokens = torch.full((len(prompts), length + steps), -1, dtype=torch.long, device=device)
    tokens[:, :length] = torch.tensor(prompts, dtype=torch.long, device=device)
    stop_tokens = torch.tensor([-1], device=device)  # matches nothing, so that lengths are fixed; the test for it stays
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    seconds: list[float] = []
    logprobs: list[list[float]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    previous = 0
    synchronize(device)
    start = time.perf_counter()
    for current in range(length, length + steps):
        logits = model(tokens[:, previous:current], previous)[:, -1]
        chosen = torch.argmax(logits, dim=-1)
        tokens[:, current] = chosen
        finished |= torch.isin(chosen, stop_tokens)
        previous = current
        if bool(finished.all()):
            break
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if with_logprobs:
            best = logits.topk(2, dim=-1).values
            scores = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
            for row, (score, margin) in enumerate(
                zip(scores.tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True)
            ):
                logprobs[row].append(score)
                margins[row].append(margin)
    generated = tokens[:, length:].tolist()
    return Run(generated, seconds, logprobs, margins) if with_logprobs else Run(generated, seconds)


def answer(channel: IO[str], message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def serve(requests: IO[str], channel: IO[str]) -> int:
    """Answer until stdin ends. A failure is one `{"error": ...}` line, after which the process is of no more use."""
    try:
        model = build(json.loads(requests.readline()))
        answer(channel, {"ready": True})
        for line in requests:
            request = json.loads(line)
            run = generate(model, request["prompts"], request["steps"], request["logprobs"])
            answer(channel, vars(run))
    except Exception as error:
        answer(channel, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def main() -> int:
    # Libraries print to stdout as they start; the answers get a descriptor of their own, and what is printed goes to
    # stderr.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with channel:
        return serve(sys.stdin, channel)


if __name__ == "__main__":
    sys.exit(main())
