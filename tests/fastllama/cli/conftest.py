"""One checkpoint and one model that all tests of the command line share."""

import pytest

from fastllama import Llama
from tests.support.checkpoints import random_weights, tiny_params, write_meta, write_tokenizer


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Meta checkpoint with its tokenizer in the same folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    params = tiny_params()
    write_meta(folder, params, random_weights(params, seed=7))
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="package")
def llm(checkpoint: str) -> Llama:
    return Llama.build(checkpoint, checkpoint, 64, 4, device="cpu")
