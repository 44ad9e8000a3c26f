"""What a model's first calls would wait for, done when it is built: kernels are compiled and graphs captured.

Which kernels a call launches is decided by its number of rows and of tokens, in a few classes each: one token, up to 8,
up to 16, more, and powers of two of rows beyond 32. One run of each class compiles all there is; no later batch, prompt
or context brings another.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from fastllama.decode_graph import Decoder
from fastllama.model import Transformer
from fastllama.prefill import prefill

# One number of rows of each class; beyond these the next class begins after each power of two.
ROWS = (1, 3, 9, 17)
# Tokens of a prompt: a few, few enough for a decode step's kernels, and as many as the library multiplies.
PROMPT_TOKENS = (2, 12, 40)


def warm(decoder: Decoder, batch_sizes: Sequence[int], progress: bool | None = None) -> None:
    """Compile what calls of any size will launch, and capture the graphs of these batch sizes. Waits for the device.

    Nothing is compiled for a backend that has no kernels of its own. Cache rows are overwritten. progress: a bar on
    stderr; None shows it where that is a terminal.
    """
    model = decoder.model
    tasks: list[Callable[[], None]] = []
    if model.ops.supports_cuda_graphs(model.device):
        most_rows, most_tokens = model.cache.max_batch_size, model.cache.max_seq_len
        tasks += [partial(decoder.rehearse, rows) for rows in row_classes(most_rows, batch_sizes)]
        tasks += [partial(_prefill, decoder, n) for n in dict.fromkeys(min(n, most_tokens) for n in PROMPT_TOKENS)]
    hidden = True if progress is False or not tasks else None
    tasks.append(partial(decoder.warm, batch_sizes))
    for task in tqdm(tasks, desc="preparing kernels and graphs", unit="run", disable=hidden):
        task()


def row_classes(most: int, others: Sequence[int] = ()) -> list[int]:
    """Numbers of rows, of which each launches something that the others do not, up to the most that a model takes."""
    beyond = [2**power + 1 for power in range(5, most.bit_length())]
    return sorted({min(rows, most) for rows in (*ROWS, *beyond, *others)})


@torch.inference_mode()
def _prefill(decoder: Decoder, n_tokens: int) -> None:
    model: Transformer = decoder.model
    with model.exclusively(), decoder.launching():
        prefill(model, [[0] * n_tokens])
