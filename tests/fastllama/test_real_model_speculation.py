"""Real models check guesses and give the answers of single steps: the built-in one, and SmolLM2-135M-Instruct."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastllama import Llama, builtin_checkpoint
from fastllama.decode_graph import Decoder
from fastllama.draft import DraftGuesser
from fastllama.model import Transformer
from fastllama.speculation import Guesser, LookupGuesser
from tests.support import smollm2
from tests.support.near_ties import count_near_ties

TEXTS = [
    "Repeat this: the old harbour of Lisbon was rebuilt, and the old harbour of Lisbon was wide. The old harbour",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\ndef multiply(a, b):\n",
    "Once upon a time there was a fox who",
    "1, 2, 3, 4, 5,",
]
SAMPLING = [(0.0, 1.0), (0.6, 0.9), (2.0, 1.0)]
N_TOKENS = 48


def answers(llm: Llama, n_rows: int, temperature: float, top_p: float) -> Any:
    prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in TEXTS[:n_rows]]
    seeds = [10 + row for row in range(n_rows)]
    return prompts, seeds, llm.generate(prompts, N_TOKENS, temperature, top_p, logprobs=True, seed=seeds)


def check(llm: Llama, guessers: dict[str, Guesser], counts: Sequence[int | None]) -> None:
    """Compare all kinds of guesses, numbers of guesses, rows and sampling with plain steps."""
    plain, near_ties, n_answers = llm.decoder, 0, 0
    for name, guesser in guessers.items():
        for n_guesses in counts:
            llm.decoder = decoder = Decoder(llm.model, guesser=guesser, n_guesses=n_guesses)
            for temperature, top_p in SAMPLING:
                for n_rows in (1, 2, 4):
                    prompts, seeds, found = answers(llm, n_rows, temperature, top_p)
                    llm.decoder = plain
                    expected = answers(llm, n_rows, temperature, top_p)[2]
                    llm.decoder = decoder
                    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seeds": seeds}
                    near_ties += count_near_ties(llm, prompts, found[0], expected[0], **sampling)
                    n_answers += n_rows
                    for row, wanted, ours, theirs in zip(found[1], expected[1], found[0], expected[0], strict=True):
                        if ours == theirs:
                            assert row == pytest.approx(wanted, abs=1e-4)
            stats = decoder.control.stats
            if name == "itself" and n_guesses:
                assert stats.accepted > 0.9 * (stats.tokens - stats.steps) and stats.tokens_per_step > 0.6 * n_guesses
            if name == "nonsense":
                assert stats.acceptance < 0.02
    llm.decoder = plain
    assert near_ties <= 0.02 * n_answers, f"{near_ties} of {n_answers} answers part at near ties"


def guessers_of(llm: Llama, itself: Transformer) -> dict[str, Guesser]:
    """Every kind of guess: looked up, by the model itself, and by a small model with random weights."""
    torch.manual_seed(1)
    small = replace(llm.model.params, dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96)
    nonsense = Transformer(small, device=llm.model.device, dtype=llm.model.dtype, backend=llm.model.backend)
    return {
        "lookup": LookupGuesser(llm.model),
        "itself": DraftGuesser(llm.model, itself),
        "nonsense": DraftGuesser(llm.model, nonsense),
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_built_in_model(backend: str) -> None:
    sizes: Any = (*builtin_checkpoint(), 256, 4)
    llm, other = (Llama.build(*sizes, device="cpu", dtype="float32", backend=backend) for _ in range(2))
    llm.tokenizer.stop_tokens = set()
    check(llm, guessers_of(llm, other.model), [4, None])


@pytest.mark.slow  # a minute
def test_smollm2() -> None:
    sizes: Any = (str(smollm2.file()), None, 256, 4)
    llm, other = (Llama.build(*sizes, device="cpu", dtype="float32") for _ in range(2))
    llm.tokenizer.stop_tokens = set()
    check(llm, guessers_of(llm, other.model), [1, 3, 7, None])
