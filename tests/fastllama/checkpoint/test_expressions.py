"""Expressions of files: the same answers as Python's, in bounded time."""

import re

import pytest

from fastllama.checkpoint import expressions
from fastllama.checkpoint.expressions import MAX_LENGTH, Expression

NAMES = ["lm_head", *(f"model.layers.{n}.{end}" for n in (0, 1, 12, 30) for end in ("self_attn.q_proj", "mlp.up_proj"))]
PUBLISHED = [
    r".*lm_head",
    r".*self_attn.*",
    r"model\.layers\.(0|1)\..*",
    r"model\.layers\.([0-9]|1[0-9]|2[0-5])\.",
    r".*mlp\.(gate|up)_proj$",
    r"^(?!.*gate).*",
    r"(?:model\.)?layers",
    r".*\.layers\.\d{1,2}\.mlp\.(?:gate|up|down)_proj",
    r"(?:.*?(?:language|text|layers).*?(?:self_attn|attention|mlp).*?(?:k_proj|q_proj|up_proj).*?)|(?:\bmodel\.x)",
]


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_expressions_fit_the_same_names(text: str) -> None:
    ours, python = Expression(text), re.compile(text)
    assert [ours.match(name) for name in NAMES] == [bool(python.match(name)) for name in NAMES]
    assert [ours.fullmatch(name) for name in NAMES] == [bool(python.fullmatch(name)) for name in NAMES]


@pytest.mark.parametrize("text", [r"(.|.)*(.|.)*(.|.)*(.|.)*b\1", r"((a|aa)+)+$"])
def test_hostile_expressions_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MAX_SECONDS", 0.05)
    for matches in (Expression(text).match, Expression(text).fullmatch):
        with pytest.raises(ValueError, match=r"takes more than 0.05 s for 'aaa.*: name the modules instead"):
            matches("a" * 300 + "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * (MAX_LENGTH + 1), "longer than 1000 characters"),
        ("(((a{90}){90}){90}){90}", "repetitions together are more than 10,000"),
        ("((ab){,3000}){1000,}", "repetitions together"),
        ("(a", "missing \\)"),
        ("*a", "nothing to repeat"),
        ("(" * 450 + ")" * 450, "recursion"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(text)
