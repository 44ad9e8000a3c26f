"""Times lm-evaluation-harness with its own model `hf` and with `fastllama`, in turn, and compares the results.

    python -m fastllama.benchmarks.lm_eval_comparison FOLDER --tasks fastllama_facts,fastllama_texts

Needs lm-eval[hf] and, for the tasks in tests/data/lm_eval, the project's root as the working directory. Times are those
of the models' answers, without the time to build. Before each run our cache forgets the earlier ones.
"""

import argparse
import json
import statistics
import time
from typing import Any

import lm_eval
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from fastllama.lm_eval_model import FastLlama

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def timed(model: Any, seconds: dict[str, float]) -> None:
    """Have the model's methods add their time to seconds["now"]."""

    def add_time_of(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                seconds["now"] += time.perf_counter() - begin

        return call

    for kind in KINDS:
        setattr(model, kind, add_time_of(getattr(model, kind)))


def differences(ours: dict[str, Any], theirs: dict[str, Any], task: str) -> tuple[float, int]:
    """(the largest difference of two log-probabilities, the number of texts and greedy flags that differ)."""
    largest, n_different = 0.0, 0
    samples = zip(ours["samples"][task], theirs["samples"][task], strict=True)
    for one, other in ((a, b) for mine, his in samples for a, b in zip(_flat(mine), _flat(his), strict=True)):
        if isinstance(one, float):
            largest = max(largest, abs(one - other))
        else:
            n_different += one != other
    return largest, n_different


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = value["resps"]
    return [one for part in value for one in _flat(part)] if isinstance(value, list | tuple) else [value]


def main() -> None:
    """Print a line per task, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a Hugging Face checkpoint with its tokenizer")
    parser.add_argument("--tasks", default="fastllama_facts,fastllama_letters,fastllama_stories,fastllama_texts")
    parser.add_argument("--include_path", default="tests/data/lm_eval")
    parser.add_argument("--limit", type=int, default=None, help="documents of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_size", type=int, default=8, help="of hf")
    parser.add_argument("--rows", type=int, default=16, help="of ours")
    options = parser.parse_args()
    build = {"dtype": options.dtype, "device": options.device}
    models = {
        "hf": get_model("hf")(options.folder, batch_size=options.batch_size, **build),
        "fastllama": FastLlama(options.folder, batch_size=options.rows, **build),
    }
    seconds = {"now": 0.0}
    for model in models.values():
        timed(model, seconds)
    tasks, report = TaskManager(include_path=options.include_path), {}
    for task in options.tasks.split(","):
        times: dict[str, list[float]] = {name: [] for name in models}
        found: dict[str, dict[str, Any]] = {}
        for _ in range(options.rounds):
            for name, model in models.items():
                models["fastllama"].llm.model.cache.pool.forget()
                seconds["now"] = 0.0
                run = {"model": model, "tasks": [task], "task_manager": tasks, "limit": options.limit}
                found[name] = lm_eval.simple_evaluate(**run, bootstrap_iters=0, log_samples=True)
                times[name].append(seconds["now"])
        ratios = [theirs / ours for theirs, ours in zip(times["hf"], times["fastllama"], strict=True)]
        largest, n_different = differences(found["fastllama"], found["hf"], task)
        report[task] = {"seconds": times, "ratios": ratios, "largest": largest, "different": n_different}
        print(
            f"{task}: hf {min(times['hf']):.1f} s, fastllama {min(times['fastllama']):.1f} s, faster by "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); log-probabilities within "
            f"{largest:.1e}, {n_different} answers differ",
            flush=True,
        )
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "tasks": report}))


if __name__ == "__main__":
    main()
