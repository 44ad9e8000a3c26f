"""Expressions of files: the same answers as Python's, in bounded time."""

import random
import re
import warnings

import pytest

from fastllama.checkpoint.expressions import MAX_DEPTH, MAX_LENGTH, Expression

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
HOSTILE = [
    r"(.+)+!",
    r"(.*)*(.*)*(.*)*(.*)*!",
    r"(a|.|.)*!",
    r".?" * 400 + "!",
    r"(.?){40}" * 20 + "!",
    r"(" * MAX_DEPTH + ".*" + ")*" * MAX_DEPTH + "!",
    r"(?=.*" * MAX_DEPTH + "!" + ")" * MAX_DEPTH,
]
ATOMS = ["a", "b", ".", "[ab]", "[^a]", "[]a]", r"\.", r"\w", "^", "$", r"\b", r"\Z", "a", "b", "{"]
SIGNS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0,3}?"]


def random_expression(source: random.Random, depth: int) -> str:
    parts = []
    for _ in range(source.randint(0, 3)):
        if depth and source.random() < 0.35:
            inner = "|".join(random_expression(source, depth - 1) for _ in range(source.randint(1, 3)))
            part = f"{source.choice(['(', '(?:', '(?=', '(?!'])}{inner})"
        else:
            part = source.choice(ATOMS)
        parts.append(part + (source.choice(SIGNS) if source.random() < 0.4 else ""))
    return "".join(parts)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_expressions_fit_the_same_names(text: str) -> None:
    ours, python = Expression(text), re.compile(text)
    assert [ours.match(name) for name in NAMES] == [bool(python.match(name)) for name in NAMES]
    assert [ours.fullmatch(name) for name in NAMES] == [bool(python.fullmatch(name)) for name in NAMES]


def test_random_expressions_mean_what_they_mean_in_python() -> None:
    source, n_compared = random.Random(1), 0
    for _ in range(3000):
        text = random_expression(source, 3)
        try:
            with warnings.catch_warnings(action="ignore"):
                python = re.compile(text)
        except re.error:  # an anchor that is repeated, which Python refuses
            continue
        ours = Expression(text)
        for _ in range(4):
            name = "".join(source.choice("ab.{") for _ in range(source.randint(0, 6)))
            assert ours.match(name) == bool(python.match(name)), (text, name)
            assert ours.fullmatch(name) == bool(python.fullmatch(name)), (text, name)
            n_compared += 1
    assert n_compared > 5000


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_expressions_end(text: str) -> None:
    """Python would try more ways than there are atoms in the universe."""
    assert not Expression(text).match("model.layers.127.self_attn.q_proj")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * (MAX_LENGTH + 1), "longer than 1000 characters"),
        ("(a", r"a \( without a \)"),
        ("a)", r"a \) without a \("),
        ("(" * 5000, "longer"),
        ("(" * 30 + ")" * 30, "groups in more than 20 others"),
        ("*a", "nothing to repeat"),
        ("a**", "nothing to repeat"),
        ("a++", "nothing to repeat"),
        ("[a", "unterminated character set"),
        ("a\\", "bad escape"),
        (r"(a)\1", r"\\1 is not read here"),
        ("(?i)a", r"groups that begin with \(\?i are not read here"),
        ("(?P<n>a)", r"groups that begin with \(\?P"),
        ("(?<=a)b", r"groups that begin with \(\?<"),
        ("a{1,99999999999}", "not a repetition of at most 100 times"),
        ("a{101}", "not a repetition"),
        ("a{3,2}", "not a repetition"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Expression(text)
