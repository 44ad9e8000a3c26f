"""Every launch of the models, compiled without a GPU, keeps the rules and matches the table in docs/compiled/."""

import pytest
import triton

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS
from fastllama.benchmarks.kernels_report.markdown import heading, sections
from fastllama.benchmarks.kernels_report.report import TRAFFIC, checked, table_path
from fastllama.benchmarks.kernels_report.table import H200
from tests.support.tiers import parameters

TABLED = ("3.6.0", "3.7.1")  # versions of triton with a table
SOME_MODELS = ("3-8B", "3-8B int4")  # launch every kernel
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {part: (part, ()) for part in (*GPUS, TRAFFIC)}
PARTS["some models"] = H200, SOME_MODELS


@pytest.mark.timeout(3600)  # some hundred compilations if none is cached
@pytest.mark.parametrize("case", parameters(PARTS, quick=("some models",)))
def test_compiled_kernels_match_the_table(case: tuple[str, tuple[str, ...]]) -> None:
    """The table of one GPU, of a GPU and some models, or of the bytes that launches move."""
    broken, changed = checked(*case)
    assert not broken
    if triton.__version__ not in TABLED:
        pytest.skip(f"triton {triton.__version__} has no table; the rules held")
    assert not changed, "\n".join(["if the change is meant, run `make kernels-report`:", *changed[:40]])


def test_the_table_has_every_gpu() -> None:
    if triton.__version__ in TABLED:
        assert {heading(gpu) for gpu in GPUS} <= sections(table_path().read_text(encoding="utf-8")).keys()
