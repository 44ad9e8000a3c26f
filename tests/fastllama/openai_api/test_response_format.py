"""response_format: the grammar of an answer in JSON, and every refusal."""

import enum
import json
from typing import Any, Literal

import pytest
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel, ConfigDict, Field

from fastllama import Llama
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.requests import chat_request, completion_request
from tests.fastllama.openai_api.conftest import Answering
from tests.fastllama.openai_api.tool_models import match

ASKED = [{"role": "user", "content": "Who?"}]


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Pet(BaseModel):
    name: str
    kind: Literal["cat", "dog"]
    colour: Colour | None


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="The full name")
    age: int = Field(ge=0, le=150)
    pets: list[Pet]
    friend: "Person | None" = None
    score: float | str


ANN = Person(name="Ann É", age=5, pets=[Pet(name="Tom", kind="cat", colour=Colour.RED)], score=1.5)


def wanted(response_format: Any, **options: Any) -> Any:
    return chat_request({"messages": ASKED, "response_format": response_format}, **options).params.grammar


def schema_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def test_text_is_free() -> None:
    assert wanted({"type": "text"}) is wanted(None) is None


def test_an_object_of_json(llm: Llama) -> None:
    found = wanted({"type": "json_object"})
    for text in ("{}", '{"a": [1, {"b": null}], "é": "\\n"}', '{\n  "a": 1\n}'):
        assert match(found, llm.tokenizer, text) == "whole"
    for text in ("[]", "Hello", '{"a": }', "{'a': 1}"):
        assert match(found, llm.tokenizer, text) == "wrong"


@pytest.mark.parametrize("strict", [None, False, True])
def test_schemas_of_pydantic(llm: Llama, strict: bool | None) -> None:
    """With references, and those that refer to themselves, alternatives and enumerations."""
    found = wanted(schema_of(Person.model_json_schema(), strict=strict, description="A person"))
    friends = Person(name="Bob", age=150, pets=[], friend=ANN, score="high")
    for person in (ANN, friends):
        assert match(found, llm.tokenizer, person.model_dump_json()) == "whole"
        assert match(found, llm.tokenizer, person.model_dump_json(indent=2)) == "whole"
    good = json.loads(ANN.model_dump_json())
    changes: list[dict[str, Any]] = [{"age": 151}, {"age": "5"}, {"name": None}, {"score": []}, {"extra": 1}]
    for change in [*changes, {"pets": [{"name": "x"}]}, {}]:
        text = json.dumps({**good, **change}, ensure_ascii=False)
        assert match(found, llm.tokenizer, text) == ("wrong" if change else "whole")


def test_what_the_openai_package_sends(llm: Llama) -> None:
    found = wanted(type_to_response_format_param(Person))
    whole = json.loads(ANN.model_dump_json())
    text = json.dumps(whole, ensure_ascii=False)
    assert match(found, llm.tokenizer, text) == "whole" and match(found, llm.tokenizer, text[:-9]) == "beginning"
    assert match(found, llm.tokenizer, json.dumps({**whole, "age": 1.5})) == "wrong"


def test_a_schema_may_be_left_out(llm: Llama) -> None:
    found = wanted({"type": "json_schema", "json_schema": {"name": "x"}})
    assert found == wanted({"type": "json_object"})


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


NAME = "response_format"
BAD: list[tuple[Any, str, str]] = [
    ("json_object", NAME, "must be an object"),
    ([], NAME, "must be an object"),
    ({}, f"{NAME}.type", "has no type"),
    ({"type": "xml"}, f"{NAME}.type", "must be one of text, json_object, json_schema, got 'xml'"),
    ({"type": ["text"]}, f"{NAME}.type", "must be one of"),
    ({"type": "json_object", "schema": {}}, f"{NAME}.schema", "'schema' is not a field of response_format"),
    ({"type": "json_schema"}, f"{NAME}.json_schema", "has no json_schema"),
    ({"type": "json_schema", "json_schema": "x"}, f"{NAME}.json_schema", "must be an object"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, f"{NAME}.json_schema.name", "has no name"),
    ({"type": "json_schema", "json_schema": {"name": 5}}, f"{NAME}.json_schema.name", "must be a text"),
    (schema_of([]), f"{NAME}.json_schema.schema", "must be an object"),
    (schema_of({}, strict="yes"), f"{NAME}.json_schema.strict", "must be true or false"),
    (schema_of({}, description=5), f"{NAME}.json_schema.description", "must be a text"),
    (schema_of({}, strickt=True), f"{NAME}.json_schema.strickt", "did you mean strict?"),
    (schema_of({"type": "strin"}), f"{NAME}.json_schema.schema", "Invalid type: strin"),
    (schema_of({"not": {}}), f"{NAME}.json_schema.schema", '"not"'),
    (schema_of({"$ref": "#/$defs/A"}), f"{NAME}.json_schema.schema", "$defs"),
    (schema_of({"type": "string", "pattern": "("}), f"{NAME}.json_schema.schema", "unclosed group"),
    (schema_of(deep(5000)), f"{NAME}.json_schema.schema", "nested"),
]


@pytest.mark.parametrize(("value", "param", "message"), BAD, ids=[f"{param}-{text}" for _, param, text in BAD])
def test_what_is_wrong_is_named(value: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wanted(value)
    assert caught.value.param == param and message in str(caught.value)


def test_unknown_members_pass_where_unknown_fields_do() -> None:
    assert wanted(schema_of({}, strickt=True), allow_unknown=True) == wanted(schema_of({}))


def test_a_completion_has_no_format() -> None:
    assert completion_request({"prompt": "x", "response_format": {"type": "text"}}).params.grammar is None
    with pytest.raises(InvalidRequest, match="response_format is not supported"):
        completion_request({"prompt": "x", "response_format": {"type": "json_object"}})


def test_without_llguidance_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, llm: Llama) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    bodies: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "not_compiled_before"}}]},
    ]
    for body, field in zip(bodies, ("response_format", "tools"), strict=True):
        with pytest.raises(InvalidRequest, match=r"pip install 'fastllama\[serve\]'") as caught:
            chat_request({"messages": ASKED, **body}, formatter=llm.formatter)
        assert caught.value.param == field


def test_an_answer_in_text_stays_as_it_was(answered: Answering) -> None:
    plain = answered(messages=ASKED, temperature=0, max_tokens=4)
    same = answered(messages=ASKED, temperature=0, max_tokens=4, response_format={"type": "text"})
    assert plain["choices"] == same["choices"]
