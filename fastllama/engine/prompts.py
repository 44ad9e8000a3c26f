"""What may be submitted to an engine: a prompt with its parameters, checked here, before anything runs."""

from collections.abc import Sequence
from typing import cast

from fastllama import validate
from fastllama.engine.commands import NewRequest
from fastllama.engine.facts import Facts
from fastllama.engine.grammar_matcher import GrammarMatcher, grammar_matcher
from fastllama.engine.sampling_params import SamplingParams
from fastllama.engine.scheduler import check_fits
from fastllama.tokenizer import Dialog, check_dialog

Prompt = str | Sequence[int] | Dialog


def checked_request(
    facts: Facts, prompt: Prompt, params: SamplingParams | None, first_scored: int, alternatives: Sequence[int]
) -> NewRequest:
    """The arguments of `AnyEngine.submit` as a request without a number and random streams. Raises ValueError as it."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams, got {validate.kind(params)}")
    tokens = encode(facts, prompt, spare=params.max_gen_len == 0)
    params.check_vocabulary(facts.vocab_size)
    first_scored = validate.whole_number("first_scored", first_scored, 1, max(1, len(tokens)))
    if params.echo and first_scored > 1:
        raise ValueError(f"echo needs the scores of all tokens, and first_scored is {first_scored}: leave one out")
    stops = frozenset() if params.ignore_eos else validate.stop_ids(facts.tokenizer.stop_tokens, facts.vocab_size)
    room = max(0, facts.max_seq_len - len(tokens))
    request = NewRequest(
        tokens=tokens,
        params=params,
        stop_ids=stops | set(params.stop_token_ids),
        budget=room if params.max_gen_len is None else min(params.max_gen_len, room),
        first_scored=first_scored,
        alternatives=tuple(checked_tokens(facts, alternatives)) if alternatives else (),
    )
    check_fits(request.last, facts.cache_pages)
    return request


def new_matcher(facts: Facts, request: NewRequest) -> GrammarMatcher | None:
    """The matcher of a request's grammar, at the beginning. ValueError for one that does not fit the model."""
    params = request.params
    if params.grammar is None:
        return None
    return grammar_matcher(params.grammar, facts.tokenizer, facts.vocab_size, request.stop_ids, params.min_tokens)


def encode(facts: Facts, prompt: Prompt, spare: int = 0) -> list[int]:
    """See `AnyEngine.encode`."""
    if isinstance(prompt, str):
        prompt = facts.tokenizer.encode(prompt, bos=True, eos=False)
    elif isinstance(prompt, list | tuple) and prompt and all(isinstance(message, dict) for message in prompt):
        check_dialog(prompt, "the prompt")
        prompt = facts.formatter.encode_dialog_prompt(prompt)
    return checked_tokens(facts, cast(Sequence[int], prompt), spare)


def checked_tokens(facts: Facts, prompt: Sequence[int], spare: int = 0) -> list[int]:
    """Token ids as a list. Raises as `AnyEngine.encode`."""
    sizes = {"vocab_size": facts.vocab_size, "max_seq_len": facts.max_seq_len + spare}
    try:
        return validate.prompts([prompt], max_batch_size=1, **sizes)[0]
    except (AssertionError, ValueError) as error:  # the first is Meta's type for a long prompt
        raise ValueError(str(error).replace("prompt 0", "the prompt")) from None
