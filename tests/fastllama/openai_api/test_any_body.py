"""Whatever a body holds, it is a request or refused with a reason."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import CHAT_FIELDS, COMPLETION_FIELDS, UNSUPPORTED
from fastllama.openai_api.requests import ApiRequest, chat_request, completion_request

NAMES = sorted({*CHAT_FIELDS, *COMPLETION_FIELDS, *UNSUPPORTED, "unknown"})
MEMBERS = ["role", "content", "type", "text", "5", "x", "function", "name", "parameters", "json_schema", "schema", "id"]
MEMBERS += [
    "tool_calls",
    "tool_call_id",
    "arguments",
    "mode",
    "tools",
    "allowed_tools",
    "include_usage",
    "$ref",
    "anyOf",
]
WORDS = ["function", "json_schema", "allowed_tools", "object", "tool", "assistant", "text", "{}", "auto"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)


@given(body=BODIES, value=VALUES, allow_unknown=st.booleans())
def test_a_body_is_a_request_or_refused(body: dict[str, Any], value: Any, allow_unknown: bool) -> None:
    bodies: list[Any] = [body, value, body | {"prompt": "x"}, body | {"messages": [{"role": "user", "content": "x"}]}]
    bodies += [{"messages": [value]}, bodies[3] | {"tools": [value]}, bodies[3] | {"response_format": value}]
    for parse in (completion_request, chat_request):
        for one in bodies:
            try:
                assert isinstance(parse(one, allow_unknown=allow_unknown), ApiRequest)
            except InvalidRequest as error:
                assert str(error) and error.code
