"""/tokenize with a chat: what /v1/chat/completions takes it takes, and it refuses the same."""

from typing import Any

import httpx
import pytest

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"add_special_tokens": True},
        {"documents": [{"text": "x"}]},
        {"truncate_prompt_tokens": 3},
        {"tools": [{"type": "custom"}]},
        {"tool_choice": "required"},
        {"messages": [{"role": "robot", "content": "x"}]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_chat_is_refused_what_the_chat_route_refuses(client: httpx.Client, more: dict[str, Any]) -> None:
    answers = [client.post(path, json=CHAT | more) for path in ("/tokenize", "/v1/chat/completions")]
    assert answers[0].status_code == answers[1].status_code == 400
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["error"]["param"].startswith(next(iter(more)))


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [CLOCK]},
        {"tools": [CLOCK], "tool_choice": "required"},
        {"temperature": 0.5, "stop": ["x"], "response_format": {"type": "json_object"}},
        {"add_generation_prompt": True, "add_special_tokens": False, "continue_final_message": False},
        {"chat_template": None, "chat_template_kwargs": {}, "an_unknown_field": 1},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_chat_has_the_tokens_of_the_chat_route(client: httpx.Client, more: dict[str, Any]) -> None:
    tokens = client.post("/tokenize", json=CHAT | more | {"return_token_strs": True, "prompt": "x"}).json()
    answer = client.post("/v1/chat/completions", json=CHAT | more | {"return_token_ids": True}).json()
    assert tokens["tokens"] == answer["prompt_token_ids"] and tokens["count"] == answer["usage"]["prompt_tokens"]
    assert "Hello" in "".join(tokens["token_strs"])


def test_flags_are_true_or_false(client: httpx.Client) -> None:
    for name in ("add_special_tokens", "return_token_strs"):
        answer = client.post("/tokenize", json={"prompt": "x", name: 1})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
