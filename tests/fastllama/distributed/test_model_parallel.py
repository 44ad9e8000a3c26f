"""A model on several processes over gloo gives one process's answers, for any number of checkpoint shards."""

import copy
import functools
from typing import Any

import pytest
import torch

from fastllama.args import ModelArgs
from fastllama.distributed.model_parallel import SINGLE_PROCESS, Group
from fastllama.model import Transformer
from tests.support.checkpoint_kinds import KINDS, Build
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.comparisons import assert_same_logprobs
from tests.support.parallel_cases import answers, assert_alike, assert_same_texts, build, text_answers
from tests.support.processes import run_processes
from tests.support.tiers import parameters

PARAMS = tiny_params()  # eight heads and two kv heads, so that with four processes two share a kv head
SHARDS = (1, 2, 4, 8)
SIZES = parameters({"2": 2, "4": 4}, quick=("2",))
FORMATS = [*(f"{shards} shards" for shards in SHARDS), "Llama 2's embedding", "Hugging Face"]
KIND = "Hugging Face, several files, two adapters"  # of the checkpoint whose texts are compared


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same model in every format, one that cannot be divided, and a large one."""
    root = tmp_path_factory.mktemp("parallel")
    weights = random_weights(PARAMS, seed=7)
    for shards in SHARDS:
        write_meta(root / f"{shards} shards", PARAMS, weights, shards=shards)
    write_meta(root / "Llama 2's embedding", PARAMS, weights, shards=2, embedding_axis=1)
    write_huggingface(root / "Hugging Face", PARAMS, weights, max_shard_size="100KB")
    odd = tiny_params(dim=48, n_heads=3, n_kv_heads=3)
    write_meta(root / "odd", odd, random_weights(odd, seed=1))
    large = tiny_params(dim=512, hidden_dim=4096, n_layers=5)
    write_meta(root / "large", large, random_weights(large, seed=1))
    for folder in root.iterdir():
        write_tokenizer(folder)
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    return {KIND: KINDS[KIND](tmp_path_factory.mktemp("kinds") / "model")}


@pytest.fixture(scope="module")
def expected(folders: dict[str, str]) -> dict[str, Any]:
    return answers(build(folders["1 shards"]))


@pytest.fixture(scope="module")
def results_by(folders: dict[str, str], builds: dict[str, Build], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of each process, by the number of processes; one run of each number for all tests."""

    @functools.cache
    def run(size: int) -> list[dict[str, Any]]:
        arguments: dict[str, Any] = {"folders": [folders[name] for name in FORMATS], "indivisible": folders["odd"]}
        arguments |= {"large": folders["large"], "builds": builds}
        out = tmp_path_factory.mktemp("out")
        return run_processes(size, out, "tests.support.parallel_cases:all_cases", arguments, TRITON_INTERPRET="1")

    return run


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_processes_give_one_processes_answers(
    results_by: Any, expected: dict[str, Any], size: int, format: str
) -> None:
    for found in results_by(size):
        assert_alike(found["answers"][FORMATS.index(format)], expected)


@pytest.mark.parametrize("size", SIZES)
def test_every_process_draws_the_same_tokens_from_the_same_bits(results_by: Any, size: int) -> None:
    first, *others = (found["answers"] for found in results_by(size))
    assert all(found == first for found in others)


@pytest.mark.parametrize("size", SIZES)
def test_each_process_holds_its_part(results_by: Any, expected: dict[str, Any], size: int) -> None:
    args = ModelArgs(**PARAMS)
    norms = (2 * args.n_layers + 1) * args.dim
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * args.dim
    repeated = max(1, size // args.n_kv_heads)  # processes that share a kv head each hold it
    for found in results_by(size):
        mine = found["answers"][0]
        assert mine["cached"] == expected["cached"] * repeated // size
        assert mine["weights"] == norms + (expected["weights"] - norms - kv) // size + kv * repeated // size


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_does_not_divide_is_the_same_error_in_all_processes(results_by: Any, size: int) -> None:
    errors = {found["error"] for found in results_by(size)}
    assert len(errors) == 1
    (error,) = errors
    assert f"world_size={size}" in error and "n_heads=3" in error and "use one of 1 processes" in error


@pytest.mark.parametrize("size", SIZES)
def test_an_error_of_one_process_is_raised_in_all_and_the_next_build_works(results_by: Any, size: int) -> None:
    for rank, found in enumerate(results_by(size)):
        if rank == 1:
            assert found["failure"].startswith("AssertionError: ") and "nowhere" in found["failure"]
        else:
            assert found["failure"].startswith(f"ProcessFailed: process 1 of {size} failed: AssertionError: ")
        assert found["again"]


@pytest.mark.slow  # four processes
def test_groups_smaller_than_the_world_are_used(results_by: Any, expected: dict[str, Any]) -> None:
    for rank, found in enumerate(results_by(4)):
        one = found["subsets"]
        assert_alike(one["answers"], expected)
        assert (one["rank"], one["size"], one["alone"], one["again"]) == (rank % 2, 2, 1, True)
        assert "asks for 4 processes" in one["error"] and "existing groups have 2" in one["error"]


def test_processes_that_check_guesses_give_the_same_answers(results_by: Any) -> None:
    first, second = (found["speculation"] for found in results_by(2))
    assert first == second, "both decide alike how many guesses a step checks"
    assert all(alike for alike, _, _ in first.values())
    assert first["draft"][1] > 0


def test_texts_are_those_of_one_process(results_by: Any, builds: dict[str, Build]) -> None:
    expected = text_answers(builds[KIND])
    assert expected["greedy"] != expected["drawn"] and expected["greedy chat"]
    first, second = (found["texts"][KIND] for found in results_by(2))
    assert first == second
    assert_same_texts(first, expected)


def test_interpreted_kernels_give_the_same_tokens(folders: dict[str, str], results_by: Any) -> None:
    llm = build(folders["1 shards"], backend="reference")
    tokens, logprobs = llm.generate([[5, 6, 7], [300, 2, 9, 11, 50, 3]], 2, temperature=0.0, logprobs=True)
    drawn, _ = llm.generate([[1]], 2, temperature=0.9, seed=5)
    for found in results_by(2):
        one = found["fused"]
        assert (one["tokens"], one["drawn"]) == (tokens, drawn)
        assert_same_logprobs(one["logprobs"], logprobs, "divided logprobs")


def test_host_memory_peak_is_little_above_a_processs_part(folders: dict[str, str], results_by: Any) -> None:
    weights = build(folders["large"]).model.state_dict().values()
    total, largest = (combine(weight.nbytes for weight in weights) for combine in (sum, max))
    for found in results_by(2):
        one = found["memory"]
        assert 0.5 * total <= one["weights"] < 0.51 * total
        # At its peak it also holds w1 and w3 as slices, concatenated and packed: six halves of a matrix.
        assert one["weights"] <= one["peak"] < one["weights"] + 3.5 * largest < 0.8 * total


def test_deepcopy_of_a_part_is_refused() -> None:
    args = ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=8)
    part = Transformer(args, device="cpu", dtype=torch.float32, group=Group(1, 2))
    assert part.share.n_heads == 4 and part.params.n_heads == 8
    with pytest.raises(TypeError, match="2 processes share"):
        copy.deepcopy(part)


def test_a_single_process_exchanges_nothing() -> None:
    x = torch.ones(2, 3)
    assert SINGLE_PROCESS.all_reduce(x) is x and SINGLE_PROCESS.all_gather(x) is x
    with pytest.raises(KeyError), SINGLE_PROCESS.propagate_errors():
        raise KeyError("raised")
