"""Bodies of responses: choices, log-probabilities in both formats, usage."""

from typing import Any

import pytest

from fastllama import Llama, Result
from fastllama.engine import Answer
from fastllama.openai_api.envelope import ServedModel
from fastllama.openai_api.errors import AnswerFailed
from fastllama.openai_api.logprobs import LEAST_LOGPROB, chat_logprobs, completion_logprobs
from fastllama.openai_api.requests import chat_request, completion_request, submit
from fastllama.openai_api.responses import response
from tests.fastllama.openai_api.conftest import Answering

PROMPT = "Once upon a time"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


def test_a_completion_has_openais_shape(llm: Llama, answered: Answering) -> None:
    body = answered(prompt=PROMPT, max_tokens=5, temperature=0, model="named")
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 1_600_000_000
    text = llm.text_completion([PROMPT], temperature=0, max_gen_len=5)[0]["generation"]
    n_prompt = len(llm.tokenizer.encode(PROMPT, bos=True, eos=False))
    assert body == {
        "object": "text_completion",
        "system_fingerprint": None,
        "model": "named",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": 5,
            "total_tokens": n_prompt + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_chat_has_openais_shape(llm: Llama, answered: Answering) -> None:
    body = answered(messages=FRANCE, temperature=0)
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 1_600_000_000
    n_prompt = len(llm.formatter.encode_dialog_prompt(FRANCE))  # type: ignore[arg-type]
    n_answer = len(llm.tokenizer.encode(PARIS, bos=False, eos=False))
    message = {"role": "assistant", "content": PARIS, "refusal": None}
    assert body == {
        "object": "chat.completion",
        "system_fingerprint": None,
        "model": "served",  # the request names none
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,  # without the stop token
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_every_prompt_has_n_answers_in_order(answered: Answering) -> None:
    body = answered(prompt=[PROMPT, "The cat"], n=2, temperature=1.5, seed=3, max_tokens=8)
    alone = answered(prompt="The cat", n=2, temperature=1.5, seed=3, max_tokens=8)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[2:] == [choice["text"] for choice in alone["choices"]] and len(set(texts)) == 4
    assert body["usage"]["completion_tokens"] == 4 * 8
    assert body["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


def test_an_echoed_text_is_the_users(llm: Llama, answered: Answering) -> None:
    """The begin of text, which the tokenizer adds, counts as a token of the prompt, and is not shown."""
    body = answered(prompt=PROMPT, echo=True, logprobs=1, max_tokens=3, temperature=0)
    (choice,) = body["choices"]
    found = choice["logprobs"]
    ids = llm.tokenizer.encode(PROMPT, bos=True, eos=False)
    assert choice["text"].startswith(PROMPT) and "".join(found["tokens"]) == choice["text"]
    assert len(found["tokens"]) == len(ids) - 1 + 3 and None not in found["token_logprobs"]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (len(ids), 3)


def test_echoed_ids_are_as_they_came(llm: Llama, answered: Answering) -> None:
    ids = llm.tokenizer.encode(PROMPT, bos=True, eos=False)
    body = answered(prompt=ids, echo=True, logprobs=1, max_tokens=0)
    (choice,) = body["choices"]
    found = choice["logprobs"]
    assert choice["text"] == f"<|begin_of_text|>{PROMPT}" and choice["finish_reason"] == "length"
    assert len(found["tokens"]) == len(ids) == len(found["top_logprobs"])
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert body["usage"]["completion_tokens"] == 0
    scored = llm.score([(ids[:1], ids[1:])])[0]
    assert found["token_logprobs"][1:] == pytest.approx(scored.logprobs, abs=1e-4)
    for token, logprob, top, is_greedy in zip(
        found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], scored.greedy, strict=True
    ):  # what lm-eval's clients read
        assert top[token] == logprob and (max(top, key=top.__getitem__) == token) == is_greedy


def test_completion_logprobs_have_the_chosen_token_beside_the_likeliest(answered: Answering) -> None:
    (choice,) = answered(prompt=PROMPT, logprobs=3, max_tokens=6, temperature=1.5, seed=4)["choices"]
    found = choice["logprobs"]
    assert found.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    text = choice["text"]
    assert "".join(found["tokens"]) == text and len(found["text_offset"]) == 6
    columns = (found[name] for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"))
    for token, offset, logprob, top in zip(*columns, strict=True):
        assert text[offset : offset + len(token)] == token
        assert top[token] == logprob and 3 <= len(top) <= 4
        assert list(top.values()) == sorted(top.values(), reverse=True)
    (choice,) = answered(prompt=PROMPT, logprobs=0, max_tokens=2, temperature=0)["choices"]
    found = choice["logprobs"]
    pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
    assert found["top_logprobs"] == [{token: logprob} for token, logprob in pairs]


def test_chat_logprobs_have_bytes(answered: Answering) -> None:
    (choice,) = answered(messages=FRANCE, temperature=0, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == PARIS == choice["message"]["content"]
    for entry in content:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 2
        best = entry["top_logprobs"][0]
        assert best == {name: entry[name] for name in ("token", "logprob", "bytes")}
    (choice,) = answered(messages=FRANCE, temperature=0, logprobs=True)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])


def test_tokens_inside_a_character_are_written_as_bytes(llm: Llama) -> None:
    tokens = llm.tokenizer.encode("a☃", bos=False, eos=False)
    scores = [-1.0] * len(tokens)
    found = completion_logprobs(llm.tokenizer, tokens, [None, *scores[1:]], None)
    assert found["tokens"][:2] == ["a", "bytes:\\xe2"] and found["text_offset"][:2] == [0, 1]
    content = chat_logprobs(llm.tokenizer, tokens, scores, None)["content"]
    assert content[1]["token"] == "\\xe2" and content[1]["bytes"] == [0xE2]


def test_minus_infinity_is_a_number_in_json(llm: Llama) -> None:
    lowest = float("-inf")
    found = completion_logprobs(llm.tokenizer, [100], [lowest], [[(101, lowest)]])
    assert found["token_logprobs"] == [LEAST_LOGPROB] and set(found["top_logprobs"][0].values()) == {LEAST_LOGPROB}
    assert chat_logprobs(llm.tokenizer, [100], [lowest], None)["content"][0]["logprob"] == LEAST_LOGPROB


def test_stop_strings_cut_text_and_counts_alike(answered: Answering) -> None:
    body = answered(messages=FRANCE, temperature=0, stop=" is", logprobs=True)
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "The capital of France" and choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "The capital of France"


def test_a_failed_answer_is_an_error(llm: Llama) -> None:
    answer = Answer(0, finish_reason="error", error="the logits are not finite")
    with pytest.raises(AnswerFailed, match="not finite"):
        response(completion_request({"prompt": "x"}), [Result([1], [answer])], ServedModel("m", llm.tokenizer))


def test_cached_tokens_are_counted(llm: Llama) -> None:
    system = {"role": "system", "content": "You answer questions about the capitals of countries. " * 8}
    engine = llm.engine()
    usages: list[dict[str, Any]] = []
    for country in ("Spain", "Norway"):
        request = chat_request({"messages": [system, {"role": "user", "content": f"{country}?"}], "max_tokens": 2})
        results = [one.result() for one in submit(engine, request)]
        usages.append(response(request, results, ServedModel("m", llm.tokenizer))["usage"])
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == 0 and cached[1] >= 64 and cached[1] % 64 == 0
