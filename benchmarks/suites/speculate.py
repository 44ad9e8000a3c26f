"""The speculate suite: answers with and without guesses, on tasks that copy and tasks that do not.

Both run on the same model in turn. A time is that of an answer from its first token to its last: the prompt costs the
same. Stop tokens end answers, as for users. Outputs are compared first.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch

from fastllama.benchmarks.models import ModelSpec
from fastllama.benchmarks.near_ties import Parting, partings
from fastllama.benchmarks.statistics import summarize, throughput
from fastllama.benchmarks.suites.interleaved import Case, Progress, rounds_in_turn
from fastllama.benchmarks.suites.speculate_tasks import TASKS, groups_of, prompts_of
from fastllama.benchmarks.tables import Columns, Record
from fastllama.benchmarks.timing import Contention, synchronize
from fastllama.chat_format import NoFormat
from fastllama.decode_graph import Decoder
from fastllama.generation import Llama
from fastllama.speculation import LookupGuesser

MOST_PROMPT_TOKENS = 1024  # longer prompts, of tokenizers with short tokens, lose their beginning
SAMPLINGS = {"greedy": (0.0, 1.0), "drawn": (0.6, 0.9)}  # (temperature, top_p)
SEED = 5
PLAIN, GUESSING = "plain", "guessing"
SHARES = ("tokens_per_step", "acceptance", "guessing")  # of SpeculationStats, that a record has

COLUMNS: Columns = {
    "batch": itemgetter("batch"),
    "task": itemgetter("task"),
    "tokens": itemgetter("sampling"),
    "answers": itemgetter("total_output_tokens"),
    "plain tokens/s": lambda record: f"{record['plain']['tokens_per_second']['p50']:.1f}",
    "tokens/s": lambda record: f"{record['tokens_per_second']['p50']:.1f}",
    "times": lambda record: "{p50:.2f}x ({minimum:.2f}-{maximum:.2f})".format_map(record["ratio"]),
    "tokens a step": lambda record: f"{record['tokens_per_step']:.2f}",
    "right": lambda record: f"{record['acceptance']:.0%}",
    "guessing": lambda record: f"{record['guessing']:.1%}",
    "part": lambda record: f"{len(record['partings'])} of {record['batch']}",
    "near ties": lambda record: sum(one["is_near_tie"] for one in record["partings"]),
}


@dataclass(frozen=True)
class Speculation:
    """Which guesses are measured: the arguments of `Llama.build`."""

    speculate: str = "lookup"
    draft: str | None = None
    n_guesses: int | str = "auto"


DEFAULT_SPECULATION = Speculation()


@dataclass(frozen=True)
class Answers:
    """The rows' tokens, and the seconds from the first to the last."""

    tokens: list[list[int]]
    seconds: float


def build(spec: ModelSpec, speculation: Speculation) -> Llama:
    """The model with its decoder that checks guesses. ValueError for a draft of random weights."""
    source = spec.source
    if source.ckpt_dir is None:
        if speculation.draft is not None:
            raise ValueError(f"{source.name} has random weights and a vocabulary of its own: it takes no draft model")
        llm, count = spec.build(), speculation.n_guesses
        n_guesses = count if isinstance(count, int) else None
        llm.decoder = Decoder(llm.model, guesser=LookupGuesser(llm.model), n_guesses=n_guesses)
        return llm
    return Llama.build(
        source.ckpt_dir,
        source.tokenizer_path,
        spec.max_seq_len,
        spec.max_batch_size,
        device=spec.device,
        dtype=spec.dtype,
        backend=spec.backend,
        quantize=spec.quantize,
        **asdict(speculation),
    )


def records(case: Case, llm: Llama, speculation: Speculation, progress: Progress) -> Iterator[Record]:
    """A record for each task, or group of tasks, and each kind of sampling."""
    decoders = {PLAIN: Decoder(llm.model), GUESSING: llm.decoder}
    for group in groups_of(case.batch):
        prompts = _encoded(llm, prompts_of(group, case.batch))
        for name, sampling in SAMPLINGS.items():
            progress(f"{group}, {name}")
            copies = TASKS[group].copies if group in TASKS else {"copying": True, "other": False}.get(group)
            about = {"task": group, "copies": copies, "sampling": name, **asdict(speculation)}
            yield about | _measured(case, llm, decoders, prompts, *sampling)
    llm.decoder = decoders[GUESSING]


def _encoded(llm: Llama, texts: list[str]) -> list[list[int]]:
    if isinstance(llm.formatter, NoFormat):
        prompts = [llm.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    else:
        prompts = [llm.formatter.encode_dialog_prompt([{"role": "user", "content": text}]) for text in texts]
    return [prompt[-MOST_PROMPT_TOKENS:] for prompt in prompts]


def _measured(
    case: Case, llm: Llama, decoders: dict[str, Decoder], prompts: list[list[int]], temperature: float, top_p: float
) -> Record:
    """The figures of one task: outputs are compared, then both decoders are timed in turn."""
    seeds = [SEED + row for row in range(len(prompts))]

    def run(name: str) -> Answers:
        llm.decoder = decoders[name]
        return _answers(llm, prompts, case.steps, temperature, top_p, seeds)

    expected, found = run(PLAIN), run(GUESSING)  # also the warm-up
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seeds": seeds}
    parted = partings(llm, prompts, found.tokens, expected.tokens, **sampling)
    contention, before = Contention(), llm.speculation
    seconds: dict[str, list[float]] = {PLAIN: [], GUESSING: []}
    for _, names in rounds_in_turn(seconds, case.rounds):
        for name in names:
            seconds[name].append(run(name).seconds)
    llm.decoder = decoders[GUESSING]
    after = llm.speculation
    assert before is not None and after is not None
    done = (after - before).to_json()
    n_tokens = {PLAIN: _timed_tokens(expected), GUESSING: _timed_tokens(found)}
    rates = [
        (n_tokens[GUESSING] / own) / (n_tokens[PLAIN] / plain)
        for own, plain in zip(seconds[GUESSING], seconds[PLAIN], strict=True)
    ]
    return {
        "input_lens": [len(prompt) for prompt in prompts],
        "total_output_tokens": sum(map(len, found.tokens)),
        **throughput(n_tokens[GUESSING], seconds[GUESSING]),
        "plain": throughput(n_tokens[PLAIN], seconds[PLAIN]),
        "ratio": asdict(summarize(rates)),
        **{name: done[name] for name in SHARES},
        "partings": [one._asdict() for one in parted],
        "other_cores": contention.cores(),
        "peers": {},
        **_disagreement(llm, parted),
    }


def _answers(
    llm: Llama, prompts: list[list[int]], steps: int, temperature: float, top_p: float, seeds: list[int]
) -> Answers:
    tokens: list[list[int]] = [[] for _ in prompts]
    begin, waiting = 0.0, set(range(len(prompts)))
    synchronize(llm.model.device)
    for increment in llm.stream(prompts, steps, temperature, top_p, seed=seeds):
        tokens[increment.row] += increment.tokens
        if waiting:
            waiting.discard(increment.row)
            begin = time.perf_counter()
    return Answers(tokens, max(time.perf_counter() - begin, 1e-9))


def _timed_tokens(answers: Answers) -> int:
    """Tokens after the first of each row, at least one."""
    return max(1, sum(map(len, answers.tokens)) - len(answers.tokens))


def _disagreement(llm: Llama, parted: list[Parting]) -> Record:
    """In float32, answers may part at near ties only. In half precision they may part anywhere."""
    if llm.model.dtype != torch.float32 or all(one.is_near_tie for one in parted):
        return {}
    worst = next(one for one in parted if not one.is_near_tie)
    return {"status": "disagrees", "not_run": f"row {worst.row} has another token {worst.token} with guesses"}
