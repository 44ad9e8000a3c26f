"""Scoring: the log-probabilities of given continuations, and of whole documents.

A pair of context and continuation is a prompt whose last tokens are scored. Nothing is generated. Pairs that differ in
their last token only are one prompt, whose last logits score them all. Pairs are sorted, so that those with the same
context follow each other and find its pages in the cache.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

from fastllama import validate
from fastllama.engine.engine import Engine
from fastllama.engine.many import Submission, run_in_order
from fastllama.engine.prompts import Prompt, checked_tokens
from fastllama.engine.request import Result
from fastllama.engine.sampling_params import SamplingParams
from fastllama.token_scores import TokenScore

SCORING = SamplingParams(max_gen_len=0, prompt_logprobs=0)


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    tokens: list[int]  # of the continuation
    logprobs: list[float]  # of each token, given those before it
    greedy: list[bool]  # whether each token is the most likely one

    @property
    def total(self) -> float:
        """The log-probability of the continuation."""
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy generation would give this continuation."""
        return all(self.greedy)


def score_pairs(engine: Engine, pairs: Iterable[tuple[Prompt, Prompt]], progress: bool | None) -> list[Score]:
    """See `Llama.score`."""
    return score_token_pairs(engine, [tokens_of_pair(engine, *pair) for pair in pairs], progress)


def score_token_pairs(
    engine: Engine, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: bool | None
) -> list[Score]:
    """The scores of (context, continuation) pairs of token ids; a context has at least one."""
    most = engine.llm.model.params.max_seq_len + 1  # the last token is predicted, and not fed
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise ValueError(f"pair {index} has no context: give it at least the token before a text")
        n_tokens = len(context) + len(continuation)
        if n_tokens > most:
            raise ValueError(
                f"pair {index} has {n_tokens} tokens, and at most {most} can be scored: shorten it, or build with a "
                "larger max_seq_len"
            )
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if continuation:
            groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(index)
    # The same contexts follow each other, long ones first: so memory that does not suffice shows at once.
    order = sorted(groups, key=lambda group: (-len(group[0]), *group))
    last = {group: [pairs[index][1][-1] for index in groups[group]] for group in order}
    submissions = (Submission([*c, *t, last[c, t][0]], SCORING, len(c), last[c, t][1:]) for c, t in order)
    scores = [Score([], [], []) for _ in pairs]
    with closing(run_in_order(engine, submissions, len(order), "scoring", progress)) as results:
        for group, result in zip(order, results, strict=True):
            n_common, found = len(group[1]), _scores_of(result)
            for number, index in enumerate(groups[group]):
                scores[index] = _score(pairs[index][1], [*found[:n_common], found[n_common + number]])
    return scores


def score_documents(
    engine: Engine, documents: Iterable[Prompt], stride: int | None, progress: bool | None
) -> list[Score]:
    """See `Llama.score_documents`."""
    most = engine.llm.model.params.max_seq_len
    if stride is not None:
        validate.whole_number("stride", stride, 1, most)
    windows: list[tuple[list[int], list[int]]] = []
    n_windows: list[int] = []
    for document in documents:
        tokens = _encoded(engine, document)
        of_document = list(document_windows([_first_token(engine), *tokens], most, stride))
        windows += of_document
        n_windows.append(len(of_document))
    found = iter(score_token_pairs(engine, windows, progress))
    return [_joined([next(found) for _ in range(count)]) for count in n_windows]


def tokens_of_pair(engine: Engine, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
    """The token ids of a context and its continuation, which may be texts or ids.

    Texts are encoded together, as the model would have read them, and spaces at the end of the context belong to the
    continuation.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            return [_first_token(engine)], _encoded(engine, continuation)
        encode = engine.llm.tokenizer.encode
        together, before = (encode(text, bos=True, eos=False) for text in (context + continuation, context))
        return before, together[len(before) :]
    if isinstance(context, str) or isinstance(continuation, str):
        raise ValueError("a pair must be two texts or two lists of token ids, got one of each")
    ids = [_encoded(engine, part) for part in (context, continuation)]
    return ids[0] or [_first_token(engine)], ids[1]


def document_windows(tokens: list[int], most: int, stride: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
    """Cut tokens into (context, continuation) pairs that score each token but the first once.

    A window scores `stride` tokens, `most` if it is None, after as many as fit: it has at most `most` + 1 tokens.
    """
    begin = 1
    while begin < len(tokens):
        end = min(begin + (stride or most), len(tokens))
        yield tokens[max(0, end - most - 1) : begin], tokens[begin:end]
        begin = end


def _encoded(engine: Engine, prompt: Prompt) -> list[int]:
    """Token ids without a begin of text; of none, too."""
    if isinstance(prompt, str):
        return engine.llm.tokenizer.encode(prompt, bos=False, eos=False)
    if not len(prompt):
        return []
    return checked_tokens(engine.facts, cast(Sequence[int], prompt), spare=len(prompt))  # of any length


def _first_token(engine: Engine) -> int:
    """The token before a text: the begin of a text, or the end of another where the tokenizer has none."""
    tokenizer = engine.llm.tokenizer
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def _scores_of(result: Result) -> list[TokenScore]:
    if (error := result.answer.error) is not None:
        raise ValueError(error)
    return result.prompt_scores or []


def _score(tokens: Sequence[int], scores: Sequence[TokenScore]) -> Score:
    return Score(list(tokens), [score.logprob for score in scores], [score.is_greedy for score in scores])


def _joined(scores: Sequence[Score]) -> Score:
    """The scores of adjacent parts as one."""
    joined = Score([], [], [])
    for score in scores:
        joined.tokens.extend(score.tokens)
        joined.logprobs.extend(score.logprobs)
        joined.greedy.extend(score.greedy)
    return joined
