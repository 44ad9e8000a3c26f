"""Scaled rope of GGUF files that is refused: fields of other formulas, and factors that no model has."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

from tests.fastllama.checkpoint.test_gguf_rope import LINEAR, ROPE, SCALING, YARN, opened


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({SCALING + "type": "longrope"}, r"type': expected 'none' or 'linear' or 'yarn', got 'longrope'"),
        ({SCALING + "type": [1]}, r"type': expected 'none' .*, got \[1\]"),
        ({SCALING + "factor": -2.0}, r"rope\.scaling\.factor': expected a positive number, got -2\.0"),
        ({SCALING + "factor": float("nan")}, r"rope\.scaling\.factor': expected a positive number, got nan"),
        ({ROPE + "scale_linear": "4"}, r"rope\.scale_linear': expected a positive number, got '4'"),
        ({SCALING + "attn_factor": 1.5}, r"attn_factor': expected 1 with the scaling type 'linear', got 1\.5"),
        ({**YARN, SCALING + "attn_factor": 0.0}, r"attn_factor': expected a positive number, got 0\.0"),
        ({**YARN, SCALING + "original_context_length": None}, r"llama\.context_length': expected .*, it is missing"),
        (
            {**YARN, SCALING + "original_context_length": "x"},
            r"original_context_length': expected an integer .*, got 'x'",
        ),
        ({**YARN, ROPE + "freq_base": 1.0}, r"freq_base': expected more than 1 with the scaling type 'yarn', got 1\.0"),
        (
            {**YARN, SCALING + "yarn_beta_slow": 64.0},
            r"yarn_beta_slow': expected at most yarn_beta_fast, 32, got 64\.0",
        ),
        ({**YARN, SCALING + "yarn_ext_factor": 0.5}, r"yarn_ext_factor': expected 1 .*, got 0\.5"),
        ({**YARN, SCALING + "yarn_attn_factor": 2.0}, r"yarn_attn_factor': expected 1, or 1\.13863, .*, got 2\.0"),
        ({**YARN, SCALING + "yarn_log_multiplier": 0.1}, r"yarn_log_multiplier': expected 0 .*, got 0\.1"),
    ],
)
def test_fields_of_other_formulas_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.gguf: field '.*{message}"):
        opened(tmp_path, fields)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(15), r"expected 16 factors, one for each frequency, got the shape \(15,\)"),
        (np.ones((1, 16)), r"expected 16 factors, one for each frequency, got the shape \(1, 16\)"),
        (np.zeros(16), r"positive numbers .*, got 0\.0, from \[0\.0, 0\.0, 0\.0, 0\.0\] and on"),
        (np.full(16, np.nan), r"positive numbers .*, got nan"),
        (np.full(16, np.inf), r"positive numbers .*, got inf"),
        (np.linspace(8, -1, 16), r"positive numbers .*, got -[0-9]"),
        (np.full(16, 1e-35), r"positive numbers .*, got [0-9.]+e-35"),
    ],
)
def test_factors_that_no_model_has_are_refused(tmp_path: Path, factors: np.ndarray, message: str) -> None:
    for fields in ({}, LINEAR, YARN):
        with pytest.raises(ValueError, match=rf"model\.gguf: tensor rope_freqs\.weight: .*{message}"):
            opened(tmp_path, fields, factors.astype(np.float32))
