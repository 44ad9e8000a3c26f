"""Trains the built-in model from nothing: `python -m fastllama.builtin.train --out DIR`.

It learns a tokenizer, trains a small Llama 3 on generated text, and writes `tokenizer.model`, `params.json` and
`consolidated.00.pth`. At the end it asks the model every fact, with the saved weights. The same seed, thread
count and kind of machine give the same files.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.builtin.bpe import encoding, learn_ranks, read_ranks, write_ranks
from fastllama.builtin.corpus import MAX_TOKENS_PER_DOCUMENT, documents, encode, tokenizer_counts
from fastllama.builtin.evaluate import print_accuracy
from fastllama.builtin.training_model import TrainableLlama, meta_state_dict

RANKS = 3200
SPECIAL_TOKENS = 256
PARAMS: dict[str, Any] = {
    "dim": 192,
    "n_layers": 4,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": RANKS + SPECIAL_TOKENS,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.9375,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
TOKENIZER_SAMPLE_DOCUMENTS = 4000
TOKENS_PER_STEP = 2048
DOCUMENTS_PER_POOL = 2048
DEFAULT_STEPS = 3200
DEFAULT_THREADS = 2
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE_SHARE = 0.02
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
MAX_GRADIENT_NORM = 1.0
REPORT_EVERY_STEPS = 50
SAVE_EVERY_SECONDS = 600

Batch = tuple[Tensor, Tensor, Tensor]


def batches(seed: int, encoder: tiktoken.Encoding) -> Iterator[Batch]:
    """An endless stream of (inputs, targets, target weights), each (B, S).

    Every row is one document, so attention never crosses documents and positions start at 0. A batch holds documents of
    similar length, so there is little padding. It has about TOKENS_PER_STEP tokens.
    """
    stream = documents(seed)
    rng = random.Random(seed)
    while True:
        pool = sorted((encode(next(stream), encoder) for _ in range(DOCUMENTS_PER_POOL)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in pool:
            # The pool is sorted, so the new document is the longest of its batch.
            if (len(groups[-1]) + 1) * len(pair[0]) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        yield from map(_padded, groups)


def _padded(group: list[tuple[list[int], list[float]]]) -> Batch:
    """One batch of documents, padded on the right with token 0 and weight 0."""
    width = max(len(tokens) for tokens, _ in group)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row, _ in group])
    weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in group])
    return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def weighted_loss(model: TrainableLlama, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy. Logits are computed only where the weight is above 0."""
    inputs, targets, weights = batch
    counted = weights > 0
    logits = model.logits(model.hidden(inputs)[counted]).float()
    losses = F.cross_entropy(logits, targets[counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up, then cosine decay to FINAL_LEARNING_RATE_SHARE of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    share = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return PEAK_LEARNING_RATE * share


def make_optimizers(model: TrainableLlama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, because it needs two thirds of AdamW's steps; AdamW for all other weights."""
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    other_weights = [*model.tok_embeddings.parameters(), *(weight for weight in model.parameters() if weight.ndim == 1)]
    return [
        # match_rms_adamw: updates have AdamW's size, so both use one learning rate.
        torch.optim.Muon(
            matrices,
            lr=PEAK_LEARNING_RATE,
            momentum=MUON_MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(other_weights, lr=PEAK_LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0, fused=True),
    ]


def save(model: TrainableLlama, out: Path) -> None:
    """Write the weights, rounded to bfloat16, and params.json."""
    torch.save(meta_state_dict(model), out / "consolidated.00.pth")
    (out / "params.json").write_text(json.dumps(PARAMS, indent=1) + "\n")


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, which makes training nearly twice as fast."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def train(out: Path, steps: int, seed: int) -> TrainableLlama:
    """Train a model and save it in `out` -> the model, its weights rounded to bfloat16 as in the saved files."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    ranks = learn_ranks(tokenizer_counts(seed, TOKENIZER_SAMPLE_DOCUMENTS), RANKS)
    write_ranks(ranks, out / "tokenizer.model")
    print(f"tokenizer: {RANKS} ranks in {time.perf_counter() - began:.0f} s", flush=True)
    torch.manual_seed(seed)
    model = TrainableLlama(PARAMS, MAX_TOKENS_PER_DOCUMENT)
    optimizers = make_optimizers(model)
    began = saved = time.perf_counter()
    n_tokens, recent_loss = 0, 0.0
    for step, batch in zip(range(steps), batches(seed, encoding(ranks)), strict=False):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16()):
            loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        n_tokens += batch[0].numel()
        recent_loss += loss.item()
        now = time.perf_counter()
        if (step + 1) % REPORT_EVERY_STEPS == 0:
            rate = n_tokens / (now - began)
            loss_text = f"step {step + 1}/{steps}  loss {recent_loss / REPORT_EVERY_STEPS:.3f}"
            print(f"{loss_text}  {n_tokens / 1e6:.2f} M tokens  {rate:.0f} tokens/s  {now - began:.0f} s", flush=True)
            recent_loss = 0.0
        if now - saved > SAVE_EVERY_SECONDS:
            save(model, out)
            saved = now
    save(model, out)
    rounded = {name: weight.to(torch.bfloat16).float() for name, weight in model.state_dict().items()}
    model.load_state_dict(rounded)
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastllama.builtin.train",
        description="Train the built-in model, then ask it its facts.",
        epilog="Example: python -m fastllama.builtin.train --out trained --seed 2",
    )
    default_out = Path(__file__).parent / "checkpoint"
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the files (default: the package's)")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of about 2000 tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the text and of the first weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=DEFAULT_THREADS, help="of the CPU (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = train(arguments.out, arguments.steps, arguments.seed)
    print_accuracy(model, encoding(read_ranks(arguments.out / "tokenizer.model")), arguments.seed)


if __name__ == "__main__":
    main()
