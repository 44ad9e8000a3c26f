"""How a projection reads its weight: the cycles of a stage's matrix instructions."""

from types import SimpleNamespace
from typing import Any

import pytest

from fastllama.benchmarks.kernels_report.weight_streaming import _chain

# A stage of 512 columns: each of four warps multiplies 16 rows by 2 chunks of 64 bytes.
BYTES = {"BYTES": 64, "UNROLL": 2, "SPLIT": 4, "BLOCK_ROWS": 16, "EPILOGUE": "none", "BLOCK_N": 8}


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({"FORMAT": "int8"}, 8),
        ({"FORMAT": "int4"}, 16 + 16),
        ({"FORMAT": "int4", "EPILOGUE": "swiglu"}, 2 * 16 + 16),
        ({"FORMAT": "int4", "BLOCK_ROWS": 32, "BLOCK_N": 16}, 4 * 16 + 2 * 16),
    ],
)
@pytest.mark.parametrize("iterations", [1, 2], ids=["a loop of one stage", "a loop of two stages"])
def test_a_stages_chain_counts_all_its_products(changes: dict[str, Any], products: int, iterations: int) -> None:
    """int4's sums of x are products with ones, once for all rows."""
    sass = SimpleNamespace(chain=lambda: (330.0 * iterations, products * iterations))
    compiled: Any = SimpleNamespace(sass=sass, instructions=["HMMA.16816.F32.BF16 R24, R24, R6, RZ"], warps=4)
    assert _chain(BYTES | changes, compiled) == pytest.approx(330.0)
