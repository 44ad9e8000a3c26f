"""gpt-fast as a peer, from a checkout that the user names: its model and its greedy step.

The step is compiled as in gpt-fast's own program, except on a CPU, where torch 2.13's compiler rejects its attention.
Prompts must be equally long. The step returns probabilities, and this module chooses the most likely token.
"""

import importlib
import sys
from functools import partial
from pathlib import Path
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
    unsupported_biases,
    unsupported_head_dim,
    unsupported_rope,
)
from fastllama.benchmarks.runners import Run

FILES = ("model.py", "generate.py")
ROPE_TYPES = ("default", "llama3")


def invalid_checkout(checkout: str | None) -> str | None:
    """The reason why there is no gpt-fast in this folder, or None."""
    if checkout is None:
        return "no checkout of gpt-fast named: --gpt_fast DIR"
    missing = [name for name in FILES if not Path(checkout, name).is_file()]
    return f"{checkout} is no checkout of gpt-fast: it lacks {' and '.join(missing)}" if missing else None


def unsupported(args: ModelArgs) -> str | None:
    """The reason why gpt-fast cannot run this model, or None."""
    reason = unsupported_head_dim("gpt-fast", args) or unsupported_biases("gpt-fast", args)
    return reason or unsupported_rope("gpt-fast", args, ROPE_TYPES)


def build(spec: ModelSpec, request: dict[str, Any]) -> Generate:
    """gpt-fast's Transformer holding the weights of `spec`."""
    args = spec.args
    sys.path.insert(0, request["gpt_fast"])
    code, program = importlib.import_module("model"), importlib.import_module("generate")
    config = code.ModelArgs(
        block_size=args.max_seq_len,
        vocab_size=args.vocab_size,
        n_layer=args.n_layers,
        n_head=args.n_heads,
        n_local_heads=args.n_kv_heads,
        dim=args.dim,
        intermediate_size=args.hidden_dim,
        head_dim=args.head_dim,
        rope_base=args.rope_theta,
        norm_eps=args.norm_eps,
        rope_scaling=rope_scaling(args) if args.use_scaled_rope else None,
    )
    with torch.device("meta"):
        model = code.Transformer(config)
    model.load_state_dict(dict(spec.tensors()), assign=True)
    model = model.to(device=spec.device, dtype=spec.dtype).eval()
    compile_or_fail()
    step = program.decode_one_token
    if spec.device.type == "cuda":
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    return partial(generate, model, program, step, args.max_seq_len)


def _resize_caches(model: Any, rows: int, max_seq_len: int) -> None:
    """Give the model caches of exactly `rows` rows: its attention reads all rows."""
    if model.max_batch_size != rows:
        model.max_batch_size = -1  # otherwise a smaller batch would keep the larger caches
        with torch.device(model.output.weight.device):
            model.setup_caches(max_batch_size=rows, max_seq_length=max_seq_len)


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
    _resize_caches(model, len(prompts), max_seq_len)
    ids = torch.tensor(prompts)
    device = model.output.weight.device
    length, longest = ids.shape[1], model.max_seq_length
    tokens: list[list[int]] = [[] for _ in prompts]

    def record(probs: Tensor) -> Tensor:
        """Record one step: probs (B, V) -> the most likely tokens (B, 1)."""
        chosen = probs.argmax(-1, keepdim=True)
        for row, token in enumerate(chosen[:, 0].tolist()):
            tokens[row].append(token)
        recorder.end_step()
        if with_logprobs:
            logs = probs.topk(2, -1).values.float().log()
            recorder.add_scores(logs[:, 0].tolist(), (logs[:, 0] - logs[:, 1]).tolist())
        return chosen

    recorder = Recorder(len(prompts), device, with_logprobs)
    mask = program.create_block_mask(program.causal_mask, 1, 1, length, longest, device=device)
    logits = model(mask, ids.to(device), torch.arange(length, device=device))
    newest = record(program.logits_to_probs(logits[:, -1]))
    mask = program.create_block_mask(program.causal_mask, 1, 1, longest, longest, device=device)
    position = torch.tensor([length], device=device)
    for _ in range(steps - 1):
        _, probs = step(model, newest.clone(), position, mask)
        newest = record(probs)
        position += 1
    return recorder.run(tokens)
