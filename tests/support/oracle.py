"""Meta's own model as the oracle: the Transformer of `llama-models`, and a simple greedy loop.

The loop shares no code with fastllama. It runs one prompt at a time, one token per call after the prompt, and takes
every log-probability from a plain log_softmax.
"""

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor


def meta_transformer(
    params: dict[str, Any], weights: dict[str, Tensor], max_seq_len: int, max_batch_size: int = 1
) -> Any:
    """Meta's Transformer (float32, CPU) with these params and weights, in Meta's names."""
    _initialise_model_parallel()
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    model = Transformer(args)
    outcome = model.load_state_dict(weights, strict=False)
    assert not outcome.unexpected_keys and set(outcome.missing_keys) <= {"rope.freqs"}, outcome
    return model.eval()


def _initialise_model_parallel() -> None:
    """Initialise fairscale's group, which Meta's layers need even for one process."""
    from fairscale.nn.model_parallel import initialize

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not initialize.model_parallel_is_initialized():
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            initialize.initialize_model_parallel(1)


@torch.inference_mode()
def meta_generate(
    model: Any, prompt: Sequence[int], max_gen_len: int, max_seq_len: int, stop_ids: Sequence[int] = ()
) -> tuple[list[int], list[float], list[float]]:
    """Greedy generation for one prompt -> (tokens, their log-probabilities, the prompt tokens' log-probabilities)."""
    tokens = list(prompt)
    logits = model.forward(torch.tensor([tokens]), 0)[0].float()
    scores = torch.log_softmax(logits, -1)
    prompt_logprobs = [0.0] + [scores[place, token].item() for place, token in enumerate(prompt[1:])]
    generated: list[int] = []
    logprobs: list[float] = []
    row = scores[-1]
    while len(generated) < max_gen_len and len(tokens) < max_seq_len:
        token = int(row.argmax())
        if token in stop_ids:
            break
        generated.append(token)
        logprobs.append(row[token].item())
        tokens.append(token)
        if len(tokens) < max_seq_len:
            row = torch.log_softmax(model.forward(torch.tensor([[token]]), len(tokens) - 1)[0, -1].float(), -1)
    return generated, logprobs, prompt_logprobs
