"""The formats of calls: which one a model has, and which answers their grammars allow."""

from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama
from fastllama.chat_format import Formatter, NoFormat
from fastllama.engine.grammar import Grammar
from fastllama.openai_api.call_detection import call_format
from fastllama.openai_api.call_formats import CallFormat, Function
from fastllama.tokenizer_base import BaseTokenizer
from tests.fastllama.openai_api.tool_models import (
    HERMES,
    LLAMA31,
    MARKERS,
    MISTRAL,
    NO_TOOLS,
    TEMPLATES,
    WEATHER,
    formatter_of,
    match,
)

FUNCTIONS = [Function("get_weather", WEATHER["function"]["parameters"]), Function("clock", {"type": "object"})]
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
PARIS = '{"city": "Paris"}'
Model = tuple[CallFormat, BaseTokenizer]


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    formatter = formatter_of(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])
    assert not isinstance(formatter, NoFormat)
    form = call_format(formatter)
    assert form.name == request.param and call_format(formatter) is form
    return form, formatter.tokenizer


def written(form: CallFormat, *calls: tuple[str, str], space: str = " ") -> str:
    """Calls (name, arguments) as a model of this format writes them."""
    objects = [f'{{"name":{space}"{name}",{space}"{form.key}":{space}{arguments}}}' for name, arguments in calls]
    if form.name == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    return f"[TOOL_CALLS] [{', '.join(objects)}]" if form.name == "mistral" else "; ".join(objects)


def rules(form: CallFormat, **options: Any) -> Grammar:
    return form.grammar(FUNCTIONS, **{"is_required": False, "has_several": True} | options)


@pytest.mark.parametrize("space", ["", " ", "\n  "], ids=["dense", "usual", "wide"])
@pytest.mark.parametrize("is_required", [False, True], ids=["auto", "required"])
def test_calls_follow_the_schema_of_their_function(model: Model, is_required: bool, space: str) -> None:
    form, tokenizer = model
    grammar = rules(form, is_required=is_required)
    for call in (("get_weather", PARIS), ("get_weather", '{"city": "Paris", "days": 3}'), ("clock", "{}")):
        text = written(form, call, space=space)
        assert match(grammar, tokenizer, text) == "whole"
        assert match(grammar, tokenizer, text[:-1]) in ("beginning", "wrong" if form.name == "hermes" else "beginning")
    for call in (
        ("get_weather", "{}"),  # city is missing
        ("get_weather", '{"city": 7}'),
        ("get_weather", '{"city": "Paris", "country": "France"}'),
        ("get_weather", '"Paris"'),
        ("get_money", PARIS),
        ("get", PARIS),
    ):
        assert match(grammar, tokenizer, written(form, call, space=space)) == "wrong"


def test_several_calls_only_where_they_are_allowed(model: Model) -> None:
    form, tokenizer = model
    text = written(form, ("clock", "{}"), ("get_weather", PARIS))
    for is_required in (False, True):
        expected = "whole" if form.has_several else "wrong"
        assert match(rules(form, is_required=is_required), tokenizer, text) == expected
        one = rules(form, is_required=is_required, has_several=False)
        assert match(one, tokenizer, text) == "wrong"
        assert match(one, tokenizer, written(form, ("clock", "{}"))) == "whole"


FREE = ["", "Hello.", '{"city": "Paris"}', '[{"nam', '{"names": ["get_weather"]}', "a < b\n\n" + "é🚀" * 9, '"name"']


def test_other_text_is_free_unless_a_call_is_required(model: Model) -> None:
    form, tokenizer = model
    for text in [*FREE, "<think>What?</think> Well."]:
        assert match(rules(form), tokenizer, text) == "whole"
        assert match(rules(form, is_required=True), tokenizer, text) == ("beginning" if not text else "wrong")


def test_text_may_come_before_calls_where_a_marker_begins_them(model: Model) -> None:
    form, tokenizer = model
    call = written(form, ("clock", "{}"))
    for text in ("I look at the clock.\n", "<think>Hm.</think>\n\n"):
        assert match(rules(form), tokenizer, text + call) == "whole"  # in Llama 3's format it is text
        wrong = written(form, ("watch", "{}"))
        assert match(rules(form), tokenizer, text + wrong) == ("whole" if form.name == "llama3" else "wrong")
        assert match(rules(form, is_required=True), tokenizer, text + call) == "wrong"
        after = "whole" if form.name == "llama3" else "wrong"
        assert match(rules(form), tokenizer, text + call + " Now I know.") == after


def test_beside_a_schema_of_answers_an_answer_is_a_call_or_follows_it(model: Model) -> None:
    form, tokenizer = model
    grammar = rules(form, answer=ANSWER)
    for text in ('{"name": "Ann"}', '{"name": "get_weather", "age": 3}', '{\n"name":"clock"}'):
        assert match(grammar, tokenizer, text) == "whole"
    assert match(grammar, tokenizer, written(form, ("get_weather", PARIS))) == "whole"
    for text in ("Hello.", '{"age": 3}', '{"name": "Ann", "x": 1}', written(form, ("get_weather", "{}"))):
        assert match(grammar, tokenizer, text) == "wrong"


def test_markers_that_are_plain_text_work_alike(tmp_path: Path) -> None:
    formatter = formatter_of(tmp_path, HERMES, markers=())
    assert not isinstance(formatter, NoFormat)
    form = call_format(formatter)
    text = written(form, ("clock", "{}"), ("get_weather", PARIS))
    for prefix in ("", "Well:\n"):
        assert match(rules(form), formatter.tokenizer, prefix + text) == "whole"
    assert match(rules(form), formatter.tokenizer, "<tool_call>x") == "wrong"
    assert match(rules(form, is_required=True), formatter.tokenizer, text) == "whole"


def test_markers_spelled_as_text_begin_calls_as_well(model: Model) -> None:
    """A reader of the text cannot tell them from special tokens, so they are no other text."""
    form, tokenizer = model
    if form.name == "hermes":
        text = written(form, ("clock", "{}"))
        assert match(rules(form), tokenizer, "Well: " + text, special=False) == "whole"
        assert match(rules(form), tokenizer, "<tool_call> x", special=False) == "wrong"
    if form.name == "mistral":
        assert match(rules(form), tokenizer, "[TOOL_CALLS] [", special=False) == "wrong"


def test_llama_3s_calls_may_have_a_tag_and_a_type(tmp_path: Path) -> None:
    formatter = formatter_of(tmp_path, LLAMA31)
    assert not isinstance(formatter, NoFormat)
    form, tokenizer = call_format(formatter), formatter.tokenizer
    call = written(form, ("get_weather", PARIS))
    typed = call.replace("{", '{"type": "function", ', 1)
    for text in (f"<|python_tag|>{call}", f"<|python_tag|> {typed}", typed, f"\n{call}"):
        assert match(rules(form), tokenizer, text) == "whole"
    assert match(rules(form), tokenizer, "<|python_tag|>print(1)") == "wrong"
    assert match(rules(form, is_required=True), tokenizer, typed) == "whole"
    assert match(rules(form, answer=ANSWER), tokenizer, f"<|python_tag|>{call}") == "whole"


@pytest.mark.parametrize("name", ["not", "uniqueItems"])
def test_a_strict_schema_must_be_kept_whole(model: Model, name: str) -> None:
    form, tokenizer = model
    schema = {"type": "object", "properties": {"a": {name: True if name == "uniqueItems" else {"type": "null"}}}}
    options: dict[str, Any] = {"is_required": True, "has_several": False}
    with pytest.raises(ValueError, match=name):
        form.grammar([Function("f", schema, is_strict=True)], **options)
    lenient = form.grammar([Function("f", schema)], **options)
    assert match(lenient, tokenizer, written(form, ("f", '{"a": []}'))) == "whole"


def test_references_stay_within_their_function(model: Model) -> None:
    form, tokenizer = model
    functions = [
        Function(name, {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": kind}}})
        for name, kind in (("f", "integer"), ("g", "boolean"))
    ]
    grammar = form.grammar(functions, is_required=True, has_several=False)
    assert match(grammar, tokenizer, written(form, ("f", '{"a": 5}'))) == "whole"
    assert match(grammar, tokenizer, written(form, ("g", '{"a": 5}'))) == "wrong"
    assert match(grammar, tokenizer, written(form, ("g", '{"a": true}'))) == "whole"


def test_ids_of_mistrals_templates_have_nine_letters(model: Model) -> None:
    form, _ = model
    ours = "call_0123456789abcdef01234567"
    if form.name != "mistral":
        assert form.template_id(ours) == ours
        return
    assert form.template_id("a1B2c3D4e") == "a1B2c3D4e"
    short = form.template_id(ours)
    assert len(short) == 9 and short.isalnum() and short == form.template_id(ours) != form.template_id(ours[:-1])


@pytest.mark.parametrize(
    ("template", "markers", "reason"),
    [
        (NO_TOOLS, MARKERS, "does not write tools"),
        ("{{ raise_exception('no tools here') }}", MARKERS, "no tools here"),
        (HERMES.replace("<tool_call>", "<call>"), MARKERS, "in a format that is not known"),
        (HERMES.replace('"arguments"', '"args"'), MARKERS, "in a format that is not known"),
        (MISTRAL, (), r"begin with \[TOOL_CALLS\], and the tokenizer has no such token"),
        (None, MARKERS, "has no chat template"),
    ],
    ids=["none", "raises", "marker", "key", "token", "base model"],
)
def test_models_without_calls_say_why(template: str | None, markers: list[str], reason: str, tmp_path: Path) -> None:
    formatter = formatter_of(tmp_path, template, markers)
    for _ in range(2):
        with pytest.raises(ValueError, match=reason):
            call_format(formatter)


def test_metas_layout_has_llama_3s_format(llm: Llama) -> None:
    formatter: Formatter = llm.formatter
    assert call_format(formatter).name == "llama3"
