"""Every launch of the models, compiled for five GPUs that are not here: the rules, and the table in docs/compiled/."""

import pytest
import triton

from fastllama.benchmarks.kernels_report import differences, report, table_path
from fastllama.benchmarks.kernels_table import violations


@pytest.mark.timeout(900)  # some four hundred compilations, where none is cached
def test_kernels_compile_as_the_table_says() -> None:
    table, rows = report()
    assert not violations(rows)
    if not table_path().exists():
        pytest.skip(f"there is no table for triton {triton.__version__}; the rules held")
    changed = differences(table)
    assert not changed, "\n".join(["if the change is meant, run `make kernels-report`:", *changed[:40]])
