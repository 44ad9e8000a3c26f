"""Our runner: it generates all tokens, and restores the stop tokens."""

from fastllama.benchmarks.runners import Ours
from tests.benchmarks.cases import ARGS, CASE, SPEC
from tests.support.comparisons import assert_same_answers


def test_ours_generates_all_tokens_and_restores_the_stop_tokens() -> None:
    llm = SPEC.build()
    prompts = CASE.prompts(ARGS.vocab_size)
    expected, scores = llm.generate(prompts, CASE.steps, temperature=0.0, logprobs=True)
    stops = {expected[0][1]}
    llm.tokenizer.stop_tokens = stops
    run = Ours(llm).run(prompts, CASE.steps, logprobs=True)
    assert_same_answers((run.tokens, run.logprobs), (expected, scores))
    assert len(run.seconds) == CASE.steps and run.seconds == sorted(run.seconds)
    assert llm.tokenizer.stop_tokens is stops
    assert Ours(llm).run(prompts, CASE.steps).logprobs is None
