"""Models for the engine's tests, built once for each file. No test leaves a request or a changed model behind."""

from collections.abc import Iterator

import pytest

from fastllama import Llama
from tests.fastllama.engine.llamas import engine_llama


@pytest.fixture(scope="module")
def shared_llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return engine_llama(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def llm(shared_llm: Llama) -> Iterator[Llama]:
    """A model on the native backend where it is built, with no stop tokens and nothing in its cache."""
    shared_llm.model.cache.pool.forget()
    shared_llm.tokenizer.stop_tokens = set()
    yield shared_llm
    shared_llm.model.check_idle()
    assert shared_llm.model.cache.pool.n_available + _held(shared_llm) == shared_llm.model.cache.pool.n_pages


def _held(llm: Llama) -> int:
    """Pages that rows of `generate` have kept since the last call."""
    return len({page for pages in llm.model.cache._pages_of_row for page in pages})
