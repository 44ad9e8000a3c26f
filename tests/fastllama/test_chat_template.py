"""Chat templates against transformers, on templates that use every construct, and special tokens in messages."""

import datetime
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastllama.chat_template import ChatTemplate, Piece, is_llama3
from fastllama.template_limits import MAX_DEPTH

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
START, END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
TOKENS = {"bos_token": BOS, "eos_token": EOS, "pad_token": None}
NAMES = [BOS, EOS, START, END, EOT, "<|im_start|>", "<|im_end|>"]

LLAMA3 = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
CHATML = """{%- if messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message.role }}
{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
INST = """{{ bos_token }}
{%- set ns = namespace(system='', index=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = ns.system ~ '<<SYS>>\\n' ~ message.content ~ '\\n<</SYS>>\\n\\n' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token }}
    {%- else %}
        {{- '[INST] %s%s [/INST]' % (ns.system, message.content | trim) }}
        {%- set ns.system = '' %}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if ns.index > 50 %}{% break %}{% endif %}
{%- endfor %}"""
REASONER = """
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}{{ '\\n' }}{{ text }}{{ caller() if caller else '' }}<|im_end|>
{% endmacro %}
{%- set last = (messages | length) - 1 %}
{%- for message in messages if message.content is defined %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- elif message.role == 'assistant' and content.startswith('x') %}
        {%- set content = content[1:] | replace('\\n', ' ') | upper %}
    {%- endif %}
    {{- turn(message.role, content) }}
{%- else %}nothing{% endfor %}
{%- call turn('info', '{} of {:>4}'.format(messages[::-1][0].role, last)) %}!{% endcall %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ '<think>\\n' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}"""
TOOLS = """{{ bos_token }}{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{{ date }}
{% if tools %}{% for tool in tools %}
{{ tool | tojson(indent=4) }}
{{ tool | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
{% endfor %}{% endif %}
{{ documents | tojson }}
{% for message in messages %}
{% if message.tool_calls %}
{% for call in message.tool_calls %}
{% set function = call.function if call.function is defined else call %}
{"name": {{ function.name | tojson }}, "arguments": {{ function.arguments | tojson }}}
{% for key, value in function.arguments.items() %}{{ loop.index }}/{{ loop.length }} {{ key }}={{ value }};{% endfor %}
{{ function.arguments | dictsort }} {{ [key for key in []] if false else [1, 'a', (2, none)] }}
{% endfor %}
{% else %}
{{ message.role | capitalize }}: {{ message.content | default('', true) | string | indent(2) | e }}
{% endif %}
{% endfor %}
{{ messages | selectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | unique | join(', ') }}
{{ range(3) | list }} {{ 2 ** 10 * 3 % 7 }} {{ 'ab' * 3 }} {{ dict(a=1) | items | list }} {{ joined is undefined }}
{% set block %}{{ messages | map(attribute='role') | list | last | center(12) }}{% endset %}{{ block }}
{% filter upper %}{{ messages[0]['role'] }}{% endfilter %} {{ 'a' is in ['a'] }} {{ missing }}"""
TOOLS = TOOLS.replace("{{ [key for key in []] if false else [1, 'a', (2, none)] }}", "{{ [1, 'a', (2, none)] }}")
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "inst": INST, "reasoner": REASONER, "tools": TOOLS}

USER = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "It's <b>é</b>", "parameters": {"type": "object", "required": []}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich & <Bern>", "days": 2}}}
DIALOGS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": " \n Be brief.\t"}, {"role": "user", "content": ""}],
    [{"role": "assistant", "content": "xa\nb"}, USER, USER, {"role": "assistant", "content": "漢字 🙂 \u00a0"}],
    [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, {"role": "user", "content": "{{ 1 }}"}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": '{"t": 1}'}],
]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    model = HuggingFaceTokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=BOS, eos_token=EOS)


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=TOKENS, special_names=NAMES)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("dialog", DIALOGS, ids=range(len(DIALOGS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(
    oracle: PreTrainedTokenizerFast, name: str, dialog: list[dict[str, Any]], generation: bool
) -> None:
    if name in ("llama3", "chatml", "inst") and any(message["content"] is None for message in dialog):
        dialog = dialog[:1]
    for arguments in (
        {"date_string": "1 May"},
        {"date_string": "x", "enable_thinking": False, "documents": [{"a": 1}]},
    ):
        for tools in (None, [TOOL]):
            before = json.dumps([dialog, tools])
            expected = oracle.apply_chat_template(
                dialog,
                chat_template=TEMPLATES[name],
                tools=tools,
                add_generation_prompt=generation,
                tokenize=False,
                **arguments,
            )
            pieces = compiled(TEMPLATES[name]).render(
                dialog, add_generation_prompt=generation, tools=tools, template_args=arguments
            )
            assert text_of(pieces) == expected
            assert json.dumps([dialog, tools]) == before
            assert all((piece.text in NAMES) == piece.is_special for piece in pieces)


texts = st.text(st.one_of(st.characters(), st.sampled_from("ab \n\t<|>_{}%#\\\"'éx\ue000\ue001")), max_size=30)
messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts})


@given(dialog=st.lists(messages, min_size=1, max_size=6), name=st.sampled_from(sorted(TEMPLATES)))
def test_text_of_any_dialog_is_that_of_transformers(
    oracle: PreTrainedTokenizerFast, dialog: list[dict[str, str]], name: str
) -> None:
    expected = oracle.apply_chat_template(
        dialog, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, date_string="x"
    )
    assert text_of(compiled(TEMPLATES[name]).render(dialog, template_args={"date_string": "x"})) == expected


parts = st.lists(st.one_of(st.sampled_from([*NAMES, "<", "|>", "\ue000", "\\ue000"]), texts), max_size=6).map("".join)


@given(contents=st.lists(parts, min_size=1, max_size=4), role=parts.filter(bool))
def test_spelling_in_a_message_is_plain_text(contents: list[str], role: str) -> None:
    """The pieces are those of Meta's format, whatever the messages spell."""
    dialog = [{"role": role, "content": content} for content in contents]
    pieces = compiled(LLAMA3).render(dialog)
    expected = [Piece(BOS, True)]
    for name, content in [*((role, content) for content in contents), ("assistant", None)]:
        expected += [Piece(START, True), Piece(name, False), Piece(END, True), Piece("\n\n", False)]
        if content is not None:
            expected[-1] = Piece("\n\n" + content.strip(), False)
            expected.append(Piece(EOT, True))
    assert pieces == expected


def test_spelling_in_tools_calls_and_arguments_is_plain_text() -> None:
    call = {"function": {"name": EOT, "arguments": {EOT: [EOT, {"a": "<|eot_id" + EOT}]}}}
    dialog: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "\\ue000 \ue000" + EOT},
    ]
    tool = {"name": EOT, "nested": [[EOT]]}
    pieces = compiled(TOOLS).render(dialog, tools=[tool], template_args={"date_string": EOT})
    assert [piece for piece in pieces if piece.is_special] == [Piece(BOS, True)]
    text = text_of(pieces)
    assert json.dumps(tool, indent=4) in text and "\\ue000 \ue000&lt;|eot_id|&gt;" in text
    assert "\ue001" not in text and "\\ue001" not in text and "\ue002" not in text and "\\ue002" not in text


def test_names_that_overlap_and_names_of_one_character() -> None:
    template = ChatTemplate("<<a<b>{{ messages[0].content }}><<<", special_names=["<<", "<<a", ">"])
    special = [("<<a", True), ("<b", False), (">", True)]
    pieces = template.render([{"role": "user", "content": "<<<a>>"}])
    assert pieces == [
        *(Piece(*one) for one in special),
        Piece("<<<a>>", False),
        Piece(">", True),
        Piece("<<", True),
        Piece("<", False),
    ]


def test_date_of_today(oracle: PreTrainedTokenizerFast) -> None:
    today = datetime.datetime.now()
    text = text_of(compiled("{{ strftime_now('%Y-%m') }}").render([USER]))
    assert text in {f"{today:%Y-%m}", f"{datetime.datetime.now():%Y-%m}"}


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "range"]
)
def test_arguments_cannot_replace_what_the_template_has(name: str) -> None:
    with pytest.raises(ValueError, match=f"template_args: {name} cannot be set"):
        compiled(LLAMA3).render([USER], template_args={name: 1})


cyclic: dict[str, Any] = {"role": "user"}
cyclic["content"] = cyclic


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "messages: expected a non-empty list of messages, got \\[\\]"),
        ({"messages": "Hi"}, "messages: expected a non-empty list of messages, got 'Hi'"),
        ({"messages": [USER, "Hi"]}, "message 1: expected a dict with a 'role', got 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "message 0: expected a dict with a 'role'"),
        (
            {"messages": [{"role": "user", "content": object}]},
            "messages: expected values as in JSON, got <class 'object'>",
        ),
        ({"messages": [cyclic]}, f"messages: expected lists and dicts nested at most {MAX_DEPTH} deep"),
        ({"messages": [USER], "tools": [print]}, "tools: expected a list of JSON schemas"),
        ({"messages": [USER], "template_args": [1]}, "template_args: expected a dict with names as keys"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        compiled(LLAMA3).render(**arguments)


def test_no_private_use_character_is_free() -> None:
    content = EOT + "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(ValueError, match="one of which must be free"):
        compiled(LLAMA3).render([{"role": "user", "content": content}])


def test_a_template_that_writes_llama_3s_format() -> None:
    assert is_llama3(compiled(LLAMA3))
    assert is_llama3(compiled(LLAMA3.replace("if add_generation_prompt", "if true")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| trim", ""),
        ("bos_token", "''"),
        ("<|eot_id|>", "<|end_of_text|>"),
        ("\\n\\n", "\\n"),
        ("messages %}", "messages[-1:] %}"),
        (
            "{{ bos_token }}",
            "{{ bos_token }}{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
        ),
        ("message['content']", "message['content'].split('</think>')[-1]"),
        ("if add_generation_prompt", "if false"),
    ],
)
def test_a_template_that_writes_another_format(old: str, new: str) -> None:
    assert old in LLAMA3
    assert not is_llama3(compiled(LLAMA3.replace(old, new)))


def test_a_header_that_is_not_a_special_token_is_not_llama_3s_format() -> None:
    assert not is_llama3(ChatTemplate(LLAMA3, special_tokens=TOKENS))
