"""Every launch of the models, compiled for seven GPUs that are not here: the rules, and the table in docs/compiled/."""

import pytest
import triton

from fastllama.benchmarks.kernels_report import differences, report

TABLED = ("3.6.0", "3.7.1")


@pytest.mark.timeout(900)  # some four hundred compilations, where none is cached
def test_kernels_compile_as_the_table_says() -> None:
    table, _, broken = report()
    assert not broken
    if triton.__version__ not in TABLED:
        pytest.skip(f"triton {triton.__version__} has no table; the rules held")
    changed = differences(table)
    assert not changed, "\n".join(["if the change is meant, run `make kernels-report`:", *changed[:40]])
