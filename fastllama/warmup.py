"""Warm-up at build: compile all kernels and capture graphs, so that the first calls do not wait for them.

The kernels of a call depend only on the classes of its numbers of rows and tokens: one, up to 8, up to 16, more; beyond
32 rows, each power of two is a class. One run of each class compiles every kernel that later calls launch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from fastllama.decode_graph import Decoder
from fastllama.model import Transformer
from fastllama.prefill import prefill

# One number of rows of each class. Beyond these, a new class begins after each power of two.
ROWS = (1, 3, 9, 17)
# Prompt lengths: two that the kernels of decode steps serve, and one for the library's matrix products.
PROMPT_TOKENS = (2, 12, 40)


def warm_up(decoder: Decoder, batch_sizes: Sequence[int], progress: bool | None = None) -> None:
    """Compile the kernels of calls of any size and capture the graphs of these batch sizes. Waits for the device.

    Nothing is compiled for a backend without its own kernels. Cache rows are overwritten. progress: whether to
    show a bar on stderr; None shows it on a terminal only.
    """
    model = decoder.model
    tasks: list[Callable[[], None]] = []
    if model.ops.supports_cuda_graphs(model.device):
        most_rows, most_tokens = model.cache.max_batch_size, model.cache.max_seq_len
        tasks += [partial(decoder.dry_run, rows) for rows in row_classes(most_rows, batch_sizes)]
        tasks += [partial(_prefill, decoder, n) for n in dict.fromkeys(min(n, most_tokens) for n in PROMPT_TOKENS)]
    hide_bar = True if progress is False or not tasks else None
    tasks.append(partial(decoder.capture_graphs, batch_sizes))
    for task in tqdm(tasks, desc="preparing kernels and graphs", unit="run", disable=hide_bar):
        task()


def row_classes(max_rows: int, batch_sizes: Sequence[int] = ()) -> list[int]:
    """One number of rows for each class up to max_rows, and the given batch sizes."""
    beyond = [2**power + 1 for power in range(5, max_rows.bit_length())]
    return sorted({min(rows, max_rows) for rows in (*ROWS, *beyond, *batch_sizes)})


@torch.inference_mode()
def _prefill(decoder: Decoder, n_tokens: int) -> None:
    model: Transformer = decoder.model
    with model.exclusively(), decoder.launch_context():
        prefill(model, [[0] * n_tokens], guesser=decoder.guesser)
