"""The public interface stays as it is written down: commands, signatures, result files."""

import pytest

from tests import interface

KEPT = interface.SNAPSHOT.read_text().splitlines()
REMEDY = "if this is meant, run `python -m tests.interface` and say so in the changelog"


def test_help_and_signatures_are_those_written_down() -> None:
    found = interface.lines(interface.helps()) + interface.lines(interface.signatures())
    assert found == [line for line in KEPT if not line.startswith("result")], REMEDY


@pytest.mark.slow  # it runs every suite, for which a compiler is needed
def test_result_files_have_the_keys_written_down() -> None:
    assert interface.lines(interface.result_keys()) == [line for line in KEPT if line.startswith("result")], REMEDY
