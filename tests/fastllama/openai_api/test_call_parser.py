"""Text and calls of an answer that comes in pieces of any size."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.openai_api.answer_parts import CallArguments, CallBegin, Part, PlainParser, TextPart
from fastllama.openai_api.call_formats import CallFormat, HermesCalls, Llama3Calls, MistralCalls
from fastllama.openai_api.call_parser import Call, CallParser, joined

NAMES = ("get_weather", "get", "clock")
PARIS = '{"city": "Pa}\\"ris \\\\", "days": [1, {"a": "]"}]}'
HERMES, MISTRAL = "<tool_call>\n%s\n</tool_call>", "[TOOL_CALLS] [%s]"


class Vocabulary:
    """Stands for a tokenizer: patterns need only its special tokens."""

    def __init__(self) -> None:
        self.special_tokens = {"[TOOL_CALLS]": 5}

    def decode(self, tokens: Sequence[int]) -> str:
        return "[TOOL_CALLS]"


FORMATS: dict[str, CallFormat] = {
    form.name: form(Vocabulary())  # type: ignore[arg-type]
    for form in (Llama3Calls, HermesCalls, MistralCalls)
}


def written(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def parse(form: str, *pieces: str) -> list[Part]:
    parser = CallParser(FORMATS[form].patterns(NAMES))
    return [*(part for piece in pieces for part in parser.push(piece)), *parser.finish()]


def read(form: str, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    text, calls = joined(parse(form, *pieces))
    return text, [(call.name, call.arguments) for call in calls]


WEATHER, CLOCK = written("get_weather", PARIS), written("clock", "{}")
WHOLE: list[tuple[str, str, tuple[str, list[tuple[str, str]]]]] = [
    ("llama3", written("get", PARIS, "parameters"), ("", [("get", PARIS)])),
    ("llama3", "<|python_tag|>" + written("clock", "{}", "parameters"), ("", [("clock", "{}")])),
    ("llama3", '\n{ "type": "function",\n"name":"clock","parameters" : {} }\n', ("", [("clock", "{}")])),
    ("llama3", "Well: " + written("clock", "{}", "parameters"), ("Well: " + written("clock", "{}", "parameters"), [])),
    ("llama3", written("watch", "{}", "parameters"), (written("watch", "{}", "parameters"), [])),
    ("llama3", written("clock", "{}", "parameters") + "  and text", ("and text", [("clock", "{}")])),
    ("llama3", '{"name": "clock", "parameters": "x"}', ('{"name": "clock", "parameters": "x"}', [])),
    ("llama3", '{"name": "Ann"}', ('{"name": "Ann"}', [])),
    ("llama3", "", ("", [])),
    ("hermes", HERMES % WEATHER, ("", [("get_weather", PARIS)])),
    ("hermes", "I look.\n\n" + HERMES % WEATHER, ("I look.", [("get_weather", PARIS)])),
    (
        "hermes",
        f"{HERMES % WEATHER}\n{HERMES % CLOCK}",
        ("", [("get_weather", PARIS), ("clock", "{}")]),
    ),
    ("hermes", HERMES % CLOCK + HERMES % CLOCK + "\n", ("", [("clock", "{}"), ("clock", "{}")])),
    ("hermes", "a < b <tool> <tool_call x\n", ("a < b <tool> <tool_call x\n", [])),
    ("hermes", "<tool_call> no call", ("<tool_call> no call", [])),
    ("hermes", "<tool_call>\n<tool_call>\n" + CLOCK + "</tool_call>", ("<tool_call>", [("clock", "{}")])),
    ("hermes", HERMES % CLOCK + " then " + HERMES % CLOCK, ("then", [("clock", "{}"), ("clock", "{}")])),
    ("hermes", " " * 50 + HERMES % CLOCK, (" " * 30, [("clock", "{}")])),
    ("hermes", "  text  ", ("  text  ", [])),
    ("mistral", MISTRAL % CLOCK, ("", [("clock", "{}")])),
    ("mistral", MISTRAL % f"{WEATHER}, {CLOCK}", ("", [("get_weather", PARIS), ("clock", "{}")])),
    ("mistral", "Hm.\n[TOOL_CALLS][" + CLOCK + "]", ("Hm.", [("clock", "{}")])),
    ("mistral", "[TOOL", ("[TOOL", [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), WHOLE, ids=[f"{form}-{text:.30}" for form, text, _ in WHOLE])
def test_answers_are_text_and_calls(form: str, text: str, expected: Any) -> None:
    assert read(form, text) == read(form, *text) == expected
    for _, arguments in expected[1]:
        json.loads(arguments)


@given(data=st.data())
def test_any_cut_gives_the_same_parts(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(FORMATS)))
    key = FORMATS[form].key
    tokens = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "\n", "  ", "{", "}", "[", "]", ","]
    tokens += [written("clock", "{}", key), written("get_weather", PARIS, key), '"name": "', "Well", HERMES % CLOCK]
    tokens += [f'{{"name": "clock", "{key}": ', '{"a": "b"}', MISTRAL % CLOCK, " " * 19]
    text = "".join(data.draw(st.lists(st.sampled_from(tokens), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, *pieces) == read(form, text) == read(form, *text)


@given(pieces=st.lists(st.text(alphabet='<>tool_cal/{}[]": n', max_size=6), max_size=12))
def test_text_without_a_call_is_not_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    expected: Any = (text, [])
    if "<tool_call>" not in text:
        assert read("hermes", *pieces) == expected
    assert read("mistral", *pieces) == expected


def test_arguments_come_as_they_are_written() -> None:
    """The name and an id are first; of the rest, each piece goes on at once."""
    parser = CallParser(FORMATS["hermes"].patterns(NAMES))
    begin = parser.push("Wait.\n")
    assert begin == [TextPart("Wait.")]  # the line end may be a part of the call
    assert parser.push("<tool_call>\n{") == parser.push('"name": "get') == []
    assert parser.push('_weather", "arguments": ') == []
    first, second = parser.push('{"ci')
    assert isinstance(first, CallBegin) and (first.index, first.name) == (0, "get_weather")
    assert first.id.startswith("call_") and len(first.id) == 29 and second == CallArguments(0, '{"ci')
    assert parser.push('ty": ') == [CallArguments(0, 'ty": ')]
    assert parser.push('"}"}}\n</tool') == [CallArguments(0, '"}"}')]
    begin = parser.push('_call><tool_call>{"name": "clock", "arguments": {}')
    assert isinstance(begin[0], CallBegin) and begin[0].id != first.id
    assert begin[1:] == [CallArguments(1, "{}")] and parser.finish() == []


def test_text_comes_as_soon_as_it_is_no_call() -> None:
    parser = CallParser(FORMATS["llama3"].patterns(NAMES))
    assert parser.push(' {"name": "clo') == []
    assert parser.push("d") == [TextPart(' {"name": "clod')]
    assert parser.push(written("clock", "{}", "parameters")) == [TextPart(written("clock", "{}", "parameters"))]
    parser = CallParser(FORMATS["hermes"].patterns(NAMES))
    assert parser.push("a <to") == [TextPart("a")] and parser.push("m>") == [TextPart(" <tom>")]


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", 'Well.\n<tool_call>\n{"name": "get_we', ("Well.", [])),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {"a": "b', ("", [("clock", '{"a": "b')])),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool', ("", [("clock", "{}")])),
        ("hermes", "Well <tool", ("Well <tool", [])),
        ("llama3", '{"name": "clock", "param', ("", [])),
        ("llama3", "<|python_tag|>{", ("", [])),
        ("llama3", "{", ("{", [])),
        ("mistral", '[TOOL_CALLS] [{"name": "clock", "arguments": {}}, {"na', ("", [("clock", "{}")])),
    ],
    ids=str,
)
def test_an_answer_may_be_cut_anywhere(form: str, text: str, expected: Any) -> None:
    assert read(form, text) == read(form, *text) == expected


@pytest.mark.parametrize(
    ("form", "text", "is_whole"),
    [
        ("hermes", HERMES % CLOCK, True),
        ("hermes", HERMES % CLOCK + HERMES % WEATHER + " and text", True),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {}', True),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": { "', False),
        ("hermes", '<tool_call>\n{"name": "clock", "arguments": {', False),
        ("hermes", '<tool_call>\n{"name": "clock", "argu', False),
        ("hermes", HERMES % CLOCK + '<tool_call>{"name": "clock", "arguments": {"a": "}', False),
        ("hermes", "no call", False),
        ("mistral", f"[TOOL_CALLS] [{WEATHER}, {CLOCK[:-2]}", False),
        ("mistral", MISTRAL % f"{WEATHER}, {CLOCK}", True),
        ("llama3", written("clock", "{}", "parameters"), True),
        ("llama3", written("clock", '{"a": {}}', "parameters")[:-2], False),
        ("llama3", "", False),
    ],
    ids=str,
)
def test_calls_are_whole_if_the_last_one_is(form: str, text: str, is_whole: bool) -> None:
    for pieces in ([text], list(text)):
        parser = CallParser(FORMATS[form].patterns(NAMES))
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        assert parser.has_whole_calls == is_whole
    assert not PlainParser().has_whole_calls


def test_an_answer_that_must_call_has_no_text() -> None:
    """What is no call is a piece of one that was cut, or white space around it."""
    texts = {
        "llama3": ["\n" * 8, "{", ' {"na', "<|python", "\n" + written("clock", "{}", "parameters") + "\n "],
        "hermes": ["  ", "\n<tool", "<tool_call>", HERMES % CLOCK + "\n<tool"],
        "mistral": ["[TOOL", " [TOOL_CALLS]", MISTRAL % CLOCK + " "],
    }
    for form, answers in texts.items():
        for text in answers:
            for pieces in ([text], list(text)):
                parser = CallParser(FORMATS[form].patterns(NAMES), has_text=False)
                parts = [*(part for piece in pieces for part in parser.push(piece)), *parser.finish()]
                found, calls = joined(parts)
                assert found == "" and [call.name for call in calls] == ["clock"] * ("clock" in text)


def test_a_plain_answer_is_text() -> None:
    parser = PlainParser()
    assert parser.push(HERMES % CLOCK) == [TextPart(HERMES % CLOCK)] and parser.push("") == parser.finish() == []


def test_parts_join() -> None:
    parts: list[Part] = [
        TextPart("a"),
        CallBegin(0, "x", "f"),
        CallArguments(0, "{"),
        TextPart("b"),
        CallArguments(0, "}"),
    ]
    assert joined(parts) == ("ab", [Call("x", "f", "{}")]) and joined([]) == ("", [])
