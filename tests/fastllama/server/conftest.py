"""One model that all tests of the server share."""

import pytest

from fastllama import Llama, builtin_checkpoint

MAX_SEQ_LEN, ROWS = 256, 4


@pytest.fixture(scope="package")
def llm() -> Llama:
    folder, tokenizer = builtin_checkpoint()
    return Llama.build(folder, tokenizer, MAX_SEQ_LEN, ROWS, device="cpu")
