"""What `json` reads and others cannot write again: numbers that are not finite, and values nested too deeply."""

import math

import pytest

from fastllama import strict_json

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400 + ".0"]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number:.12}")
def test_numbers_that_are_not_finite_are_refused_where_asked(number: str) -> None:
    text = f'{{"a": [1.5, {{"b": {number}}}]}}'
    for wrong in (text, text.encode()):
        with pytest.raises(ValueError, match=r"is not a finite number"):
            strict_json.loads(wrong, allow_nan=False)
        assert not math.isfinite(strict_json.loads(wrong)["a"][1]["b"])


def test_finite_numbers_are_read_as_json_reads_them() -> None:
    text = '{"a": [1, -0.0, 1.5, 1e308, 5e-324, 1e-999, 123456789012345678901234567890], "NaN": "1e999"}'
    for allow_nan in (True, False):
        found = strict_json.loads(text, allow_nan=allow_nan)
        assert found["a"] == [1, 0.0, 1.5, 1e308, 5e-324, 0.0, 123456789012345678901234567890]
        assert found["NaN"] == "1e999" and isinstance(found["a"][0], int) and math.copysign(1, found["a"][1]) == -1
    with pytest.raises(strict_json.ConflictingValues):
        strict_json.loads('{"a": 1.0, "a": 2.0}', allow_nan=False)


@pytest.mark.parametrize("begin_end", [("[", "]"), ('{"a":', "}"), ('[0, "[[{", ', "]")], ids=str)
@pytest.mark.parametrize("encoding", [None, "utf-8", "utf-16", "utf-32"])
def test_values_that_are_nested_too_deeply_are_refused_where_asked(
    begin_end: tuple[str, str], encoding: str | None
) -> None:
    def text(depth: int) -> str | bytes:
        found = begin_end[0] * depth + "1" + begin_end[1] * depth
        return found if encoding is None else found.encode(encoding)

    for most in (3, 40):
        for depth in (1, most - 1, most):
            assert strict_json.loads(text(depth), max_depth=most) == strict_json.loads(text(depth))
        for depth in (most + 1, most + 2, 100):
            with pytest.raises(RecursionError, match=f"more than {most} lists and objects"):
                strict_json.loads(text(depth), max_depth=most)
    assert strict_json.loads("1", max_depth=0) == 1
