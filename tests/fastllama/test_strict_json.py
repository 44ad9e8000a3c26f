"""Numbers that are not finite: `json` reads them, and strict writers cannot write them again."""

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
