"""Every launch of the models, compiled without a GPU, keeps the rules and matches the table in docs/compiled/."""

import pytest
import triton

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.markdown import heading, sections
from fastllama.benchmarks.kernels_report.report import TRAFFIC, checked, table_path
from tests.support.tiers import parameters

TABLED = ("3.6.0", "3.7.1")  # versions of triton with a table


@pytest.mark.timeout(3600)  # some hundred compilations if none is cached
@pytest.mark.parametrize("part", parameters({part: part for part in (*GPUS, TRAFFIC)}, quick=("sm_90",)))
def test_compiled_kernels_match_the_table(part: str) -> None:
    """The table of one GPU, or of the bytes that launches move."""
    broken, changed = checked(part)
    assert not broken
    if triton.__version__ not in TABLED:
        pytest.skip(f"triton {triton.__version__} has no table; the rules held")
    assert not changed, "\n".join(["if the change is meant, run `make kernels-report`:", *changed[:40]])


def test_the_table_has_every_gpu() -> None:
    if triton.__version__ in TABLED:
        assert {heading(gpu) for gpu in GPUS} <= sections(table_path().read_text(encoding="utf-8")).keys()
