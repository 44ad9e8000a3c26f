"""A checkpoint of each kind, with each kind of tokenizer, gives the same texts on one process and on two.

make test-all runs these tests; `test_model_parallel.py` has one kind for make test, in processes that it starts anyway.
"""

from typing import Any

import pytest

from tests.support.checkpoint_kinds import KINDS, WITHOUT_CHAT, write_kinds
from tests.support.parallel_cases import N_TEXT_TOKENS, answers_of_builds, assert_same_texts
from tests.support.processes import run_processes

Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, list[Results]]:
    """The answers of all kinds, of one process and of each of two."""
    builds = write_kinds(tmp_path_factory.mktemp("kinds"))
    out = tmp_path_factory.mktemp("out")
    return answers_of_builds(builds), run_processes(2, out, "tests.support.parallel_cases:answers_of_builds", builds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_texts_of_one(results: tuple[Results, list[Results]], kind: str) -> None:
    alone, shared = results
    if kind not in alone:
        pytest.skip("gguf is not installed: pip install gguf")
    assert shared[0][kind] == shared[1][kind]
    for name, expected in alone[kind].items():
        assert (expected is None) == (name.endswith("chat") and kind in WITHOUT_CHAT)
    assert_same_texts(shared[0][kind], alone[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_are_not_degenerate(results: tuple[Results, list[Results]], kind: str) -> None:
    """Else equal texts would show little."""
    if kind not in results[0]:
        pytest.skip("gguf is not installed: pip install gguf")
    one = results[0][kind]
    for completion in one["greedy"]:
        assert len(completion["tokens"]) == N_TEXT_TOKENS
        assert len(set(completion["tokens"])) > 1
    assert one["greedy"] != one["drawn"]
