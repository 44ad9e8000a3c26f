"""The public interface matches its snapshot: commands, signatures, result files."""

import pytest

from tests import interface

SNAPSHOT = interface.SNAPSHOT.read_text().splitlines()
REMEDY = "if the change is intended, run `python -m tests.interface` and say so in the changelog"


def test_help_and_signatures_match_the_snapshot() -> None:
    found = interface.lines(interface.helps()) + interface.lines(interface.signatures())
    assert found == [line for line in SNAPSHOT if not line.startswith("result")], REMEDY


@pytest.mark.slow  # it runs every suite, for which a compiler is needed
def test_result_files_have_the_keys_of_the_snapshot() -> None:
    assert interface.lines(interface.result_keys()) == [line for line in SNAPSHOT if line.startswith("result")], REMEDY
