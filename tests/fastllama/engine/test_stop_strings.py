"""Stop strings: found at once however the text is cut into pieces, and nothing of them is given out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.engine.stop_strings import StopStrings

TEXTS = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the text before the stop string that is complete first, and this one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(TEXTS, max_size=8), STOPS)
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    found = StopStrings(stops)
    given_out = ""
    for number, piece in enumerate(pieces):
        given_out += found.push(piece)
        expected, stop = cut_at_first_stop("".join(pieces[: number + 1]), stops)
        assert expected.startswith(given_out)
        if found.found is None:
            # What is held back is the beginning of a stop string, so it could not be given out.
            held = expected[len(given_out) :]
            assert stop is None and (not held or any(one.startswith(held) and one != held for one in stops))
    if found.found is None:
        given_out += found.finish()
    assert (given_out, found.found) == cut_at_first_stop("".join(pieces), stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (["END"], ["x E", "N", "D y"], ["x ", "", ""]),
        (["END"], ["xEN", "Ex"], ["x", "ENEx"]),
        (["aab"], ["aa", "a", "b"], ["", "a", ""]),
        (["bc", "abcd"], ["ab", "c"], ["", "a"]),
        ([], ["END"], ["END"]),
    ],
    ids=["over-pieces", "not-after-all", "overlapping-itself", "the-first-to-be-complete", "none"],
)
def test_text_is_held_back_until_it_is_decided(stops: list[str], pieces: list[str], released: list[str]) -> None:
    found = StopStrings(stops)
    assert [found.push(piece) for piece in pieces] == released


def test_nothing_comes_after_a_stop_string() -> None:
    found = StopStrings(["."])
    assert (found.push("a.b"), found.push("c"), found.finish(), found.found) == ("a", "", "", ".")


def test_what_was_held_back_comes_at_the_end() -> None:
    found = StopStrings(["END"])
    assert (found.push("EN"), found.finish(), found.finish()) == ("", "EN", "")
