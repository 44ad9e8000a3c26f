"""A text that the built-in model was not trained on: stories drawn with another seed."""

import random

from fastllama.builtin.stories import story

SEED = 20261  # not one that `train` uses
STORIES = 60


def held_out_text() -> str:
    """The text, always the same."""
    rng = random.Random(SEED)
    return "\n\n".join(story(rng) for _ in range(STORIES))
