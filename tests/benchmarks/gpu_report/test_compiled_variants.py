"""The launches that the GPU report tries with quantised weights, compiled without a GPU: none spills, all fit."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from fastllama.benchmarks.gpu_report.quantized_models import FORMATS
from fastllama.benchmarks.gpu_report.sizes import FULL
from fastllama.benchmarks.kernels_report.ahead_of_time import compiling_environment
from fastllama.benchmarks.kernels_report.report import CACHE
from tests.support.tiers import parameters

ROOT = Path(__file__).resolve().parents[3]
# (model, format, number of tokens), each compiled in a process of its own; and one op. One token of int4 has the
# kernel of four.
CASES = [
    *(case for case in product(FULL.models, FORMATS, ("1", "4", "16")) if case[1:] != ("int4", "1")),
    ("3.2-1B", "int4", "1", "output"),
]


@pytest.mark.timeout(3600)  # some hundred compilations if none is cached
@pytest.mark.parametrize("case", parameters({" ".join(case): case for case in CASES}, quick=("3.2-1B int4 1 output",)))
def test_no_launch_that_is_tried_spills(case: tuple[str, ...]) -> None:
    """Compiled for an H200 by another process, because this one interprets."""
    environment = compiling_environment(str(CACHE))
    script = "tests.benchmarks.gpu_report.compiled_variants"
    command = [sys.executable, "-m", script, "sm_90", *case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launches"] >= 4 and found["bad"] == []
