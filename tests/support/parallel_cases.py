"""The functions that each process runs in the tests of several processes. They return JSON values."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastllama import Dialog, Llama, SamplingParams
from fastllama.benchmarks.suites.load_and_memory import own_bytes, peak_host_memory
from fastllama.chat_format import NoFormat
from tests.support.comparisons import assert_same_logits, assert_same_logprobs

PROMPTS = [[5, 6, 7], [300, 2, 9, 11, 50, 3], [1]]
STEPS = 6
MAX_SEQ_LEN, MAX_BATCH_SIZE = 24, 4
TEXTS = ["Once upon a time", "The 12 dogs, naïve 天地\n"]
DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "Hi there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 apples?"}],
]
N_TEXT_TOKENS = 8
REQUEST = SamplingParams(max_gen_len=6, temperature=0.8, seed=3, logprobs=2, repetition_penalty=1.2)


def build(folder: str, **options: Any) -> Llama:
    tokenizer = str(Path(folder) / "tokenizer.model")
    llm = Llama.build(folder, tokenizer, MAX_SEQ_LEN, MAX_BATCH_SIZE, **{"device": "cpu", **options})
    llm.tokenizer.stop_tokens = set()
    return llm


def all_cases(arguments: dict[str, Any]) -> dict[str, Any]:
    """All cases in one group of processes, because starting processes takes longer than the cases.

    Returns every folder's answers, and the errors for a wrong size and for a failure of one process. Two processes also
    return texts of `builds`, memory and interpreted kernels; four also return groups smaller than the world.
    """
    results: dict[str, Any] = {"answers": [answers(build(folder)) for folder in arguments["folders"]]}
    results["error"] = build_error(arguments["indivisible"])
    results["failure"] = build_error("nowhere" if dist.get_rank() == 1 else arguments["folders"][0])
    results["again"] = are_alike(answers(build(arguments["folders"][0])), results["answers"][0])
    if dist.get_world_size() == 2:
        results["texts"] = answers_of_builds(arguments["builds"])
        results["speculation"] = speculation(arguments["folders"][0], results["answers"][0])
        return results | {"memory": memory(arguments["large"]), "fused": fused(arguments["folders"][1])}
    return results | {"subsets": subsets(arguments["folders"][2])}


def answers(llm: Llama) -> dict[str, Any]:
    greedy = llm.generate(PROMPTS, STEPS, temperature=0.0, logprobs=True, echo=True)
    drawn = llm.generate(PROMPTS, STEPS, temperature=0.9, top_p=0.8, logprobs=True, seed=3)
    unseeded = llm.generate(PROMPTS, STEPS, temperature=1.0, top_p=0.9)
    many = [result.answer for result in llm.generate_many(PROMPTS * 3, REQUEST)]  # more prompts than rows
    scores = llm.score([([1, 2, 3], [4, 5]), ([1, 2, 3], [6])])
    logits = llm.model.forward(torch.tensor([[1, 2, 3]]), 0)
    return {
        "tokens": [greedy[0], drawn[0], unseeded[0], [answer.tokens for answer in many]],
        "logprobs": [greedy[1], drawn[1], [answer.logprobs for answer in many], [score.logprobs for score in scores]],
        "logits": logits[0, -1].tolist(),
        "cached": llm.model.cache.k.numel(),
        "weights": sum(tensor.numel() for tensor in llm.model.state_dict().values()),
    }


def answers_of_builds(builds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The texts of every model, by name. `builds`: the arguments of its build."""
    return {name: text_answers(arguments) for name, arguments in builds.items()}


def text_answers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Greedy and drawn completions, and answers to dialogs if the model has a chat format, with log-probabilities."""
    llm = Llama.build(**arguments, max_seq_len=128, max_batch_size=len(TEXTS), device="cpu")
    has_chat = not isinstance(llm.formatter, NoFormat)
    results: dict[str, Any] = {}
    for name, sampling in {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 0.9, "seed": 3}}.items():
        options: dict[str, Any] = {"max_gen_len": N_TEXT_TOKENS, "logprobs": True, **sampling}
        results[name] = llm.text_completion(TEXTS, **options)
        results[f"{name} chat"] = llm.chat_completion(DIALOGS, **options) if has_chat else None
    return results


def assert_alike(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert equal tokens, and floats within tolerances: the number of processes changes the order of sums."""
    assert results["tokens"] == expected["tokens"]
    for row, expected_row in zip(results["logprobs"], expected["logprobs"], strict=True):
        assert_same_logprobs(row, expected_row, "divided logprobs")
    assert_same_logits(torch.tensor(results["logits"]), torch.tensor(expected["logits"]))


def assert_same_texts(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that a model's `text_answers` are equal, with log-probabilities within the tolerance."""
    assert results.keys() == expected.keys()
    for name, answers in expected.items():
        found = results[name]
        assert (found is None) == (answers is None)
        if answers is not None:
            for key in ("generation", "tokens"):
                assert [one[key] for one in found] == [one[key] for one in answers]
            ours, theirs = ([one["logprobs"] for one in ones] for ones in (found, answers))
            assert_same_logprobs(ours, theirs, "divided logprobs")


def are_alike(results: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether `assert_alike` passes."""
    try:
        assert_alike(results, expected)
    except AssertionError:
        return False
    return True


def build_error(folder: str) -> str:
    """The error of a build that must fail; "built" if it does not."""
    try:
        build(folder)
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def memory(folder: str) -> dict[str, Any]:
    """Peak growth of this process's memory during a build, without mapped files, and the bytes of its weights."""
    before = own_bytes()
    with peak_host_memory() as peak:
        llm = build(folder)
    return {"peak": peak.bytes - before, "weights": sum(t.nbytes for t in llm.model.state_dict().values())}


def speculation(folder: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Whether the answers are the expected ones with each kind of guesses, and how many were right."""
    kinds: dict[str, dict[str, Any]] = {
        "lookup": {"speculate": "lookup", "n_guesses": 3},
        "lookup auto": {"speculate": "lookup"},
        "draft": {"draft": folder, "n_guesses": 3},
        "draft auto": {"draft": folder},
    }
    results: dict[str, Any] = {}
    for name, options in kinds.items():
        llm = build(folder, **options)
        alike = are_alike(answers(llm) | {"cached": expected["cached"]}, expected)
        stats = llm.speculation
        results[name] = alike, stats.accepted if stats is not None else None, stats.steps if stats is not None else None
    return results


def fused(folder: str) -> dict[str, Any]:
    """A few tokens by interpreted kernels."""
    llm = build(folder, backend="fused")
    tokens, logprobs = llm.generate(PROMPTS[:2], 2, temperature=0.0, logprobs=True)
    drawn, _ = llm.generate(PROMPTS[2:], 2, temperature=0.9, seed=5)
    return {"tokens": tokens, "logprobs": logprobs, "drawn": drawn}


def on_gpus(arguments: dict[str, Any]) -> dict[str, Any]:
    """Answers from replayed graphs that contain NCCL's collectives.

    float32, where all tokens must be equal, with three rows and with one, which use different kernels; and bfloat16.
    """
    llm = build(arguments["folder"], device=None, dtype="float32")
    first, again = answers(llm), answers(llm)
    alone = llm.generate(PROMPTS[1:2], STEPS, temperature=0.0, logprobs=True)
    bfloat16 = build(arguments["folder"], device=None, dtype="bfloat16")
    return {
        "answers": first,
        "repeats": again["tokens"][:2] == first["tokens"][:2],  # the third has no seed, and so differs between calls
        "alone": alone,
        "bfloat16": bfloat16.generate(PROMPTS, STEPS, temperature=0.7, seed=3),
        "graphs": llm.decoder.graphs.captured_sizes,
        "device": str(llm.model.device),
    }


def subsets(folder: str) -> dict[str, Any]:
    """Models on half of the processes: through the caller's own groups, and through model_parallel_size."""
    from fairscale.nn.model_parallel import initialize

    initialize.destroy_model_parallel()
    initialize.initialize_model_parallel(2)
    llm = build(folder)
    results: dict[str, Any] = {"answers": answers(llm), "rank": llm.model.group.rank, "size": llm.model.group.size}
    try:
        build(folder, model_parallel_size=4)
    except ValueError as error:
        results["error"] = str(error)
    initialize.destroy_model_parallel()
    results["again"] = are_alike(answers(build(folder, model_parallel_size=2)), results["answers"])
    initialize.destroy_model_parallel()
    results["alone"] = build(folder, model_parallel_size=1).model.group.size
    return results
