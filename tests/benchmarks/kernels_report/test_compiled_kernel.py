"""Compiled kernels: each fault that breaks a rule is found in a kernel that has it, and in a row of the table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from fastllama.benchmarks.kernels_report.ahead_of_time import GPUS, compiling_environment
from fastllama.benchmarks.kernels_report.model_launches import MODELS
from fastllama.benchmarks.kernels_report.table import WHOLE_STEP, Row, launch_counts, violations
from tests.support.tiers import parameters

ROOT = Path(__file__).resolve().parents[3]
# From 3.9 on, triton adds a barrier before a releasing atomic. The kernels do not rely on it.
ADDS_BARRIERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@pytest.fixture(scope="module", params=parameters({gpu: gpu for gpu in ("sm_90", "gfx942")}, quick=("sm_90",)))
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The properties of the faulty kernels, by name. Another process compiles them, because this one interprets."""
    environment = compiling_environment(str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, "-m", "tests.benchmarks.kernels_report.bad_kernels", request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_load_widths_are_found_by_argument(measured: dict[str, Any]) -> None:
    assert measured["wide"]["loads"] == {"x_ptr": {"16": 1}, "weight_ptr": {"16": 1}}
    assert set(measured["narrow"]["loads"]["weight_ptr"]) == {"2"}
    assert set(measured["narrow"]["loads"]["x_ptr"]) == {"16"}
    assert measured["gather"]["loads"]["index_ptr"] and set(measured["gather"]["loads"]) == {"index_ptr", "weight_ptr"}


def test_pipelined_loads_are_found(measured: dict[str, Any]) -> None:
    dot = measured["dot"]
    assert set(dot["loads"]) == {"x_ptr", "weight_ptr"} and set(dot["loads"]["weight_ptr"]) == {"16"}
    assert dot["matrix"] > 0 and dot["shared"] > 0
    assert measured["wide"]["matrix"] == 0


def test_spills_are_found(measured: dict[str, Any]) -> None:
    assert measured["spilling"]["spills"] > 0
    assert measured["wide"]["spills"] == 0 and measured["wide"]["registers"] > 0


def test_a_processor_holds_at_least_one_program(measured: dict[str, Any]) -> None:
    assert measured["wide"]["resident"] in (8, 16)  # 2,048 threads of 256 or 128
    assert all(kernel["resident"] >= 1 for kernel in measured.values())
    assert measured["dot"]["resident"] < measured["wide"]["resident"]


def test_a_missing_barrier_is_found(measured: dict[str, Any]) -> None:
    assert measured["pass_results"]["barrier"] is True
    assert measured["pass_results_unguarded"]["barrier"] is ADDS_BARRIERS
    assert measured["wide"]["barrier"] is None


LOADS = {"q": [16], "cache_k": [16], "cache_v": [16], "pages": [4], "positions": [8]}


def row(**changes: Any) -> Row:
    sound = {
        "gpu": "sm_90",
        "model": "3-8B",
        "tokens": 64,
        "op": "attention",
        "kernel": "_attention_prefill_kernel",
        "other": 0,
        "spills": 0,
        "shared": 1000,
        "loads": LOADS,
        "matrix": 3,
        "barrier": None,
        "dependent": False,
        "waits": 0,
        "violations": [],
        "prefetched": [],
    }
    return sound | changes


def test_a_sound_row_breaks_no_rule() -> None:
    assert violations([row()]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 8}, "spills 8"),
        ({"shared": 240000}, f"240000 bytes of shared memory, of {GPUS['sm_90'].shared_bytes}"),
        ({"loads": LOADS | {"cache_k": [16, 4]}}, "loads cache_k_ptr in less than 16 bytes"),
        ({"loads": LOADS | {"?": [16]}}, "loads from an address that is no argument's"),
        ({"matrix": 0}, "uses no matrix instructions"),
        ({"barrier": False}, "has no barrier before its atomic"),
        ({"loads": {"cache_k": [16], "pages": [4]}}, "reads no cache_v"),
        ({"loads": {"cache_k": [16], "cache_v": [16]}}, "reads no pages"),
        ({"other": 2}, "launches 2 kernels of torch"),
        ({"waits": 1}, "waits without being launched as dependent"),
        ({"dependent": True, "waits": 1, "violations": ["has 2 waits, not one"]}, "has 2 waits, not one"),
    ],
)
def test_a_broken_rule_is_named_with_its_place(changes: dict[str, Any], message: str) -> None:
    (found,) = violations([row(**changes)])
    assert found == f"sm_90 3-8B attention at 64 tokens: _attention_prefill_kernel {message}"


def test_a_decode_step_must_use_dependent_launches_and_prefetches() -> None:
    sound = row(tokens=4, op="layer down", kernel="_matvec_kernel", loads={"weight": [16]}, dependent=True, waits=1)
    assert violations([sound | {"prefetched": ["weight"]}]) == []
    where = "3-8B layer down at 4 tokens: _matvec_kernel"
    assert violations([sound]) == [f"sm_90 {where} prefetches nothing"]
    ordinary = sound | {"dependent": False, "waits": 0, "prefetched": ["weight"]}
    assert violations([ordinary]) == [f"sm_90 {where} is not launched as dependent"]
    assert violations([ordinary | {"gpu": "sm_89", "prefetched": []}]) == []


STEP = {"op": "layer down", "dependent": True, "waits": 1, "prefetched": ["weight"], "loads": {"weight": [16]}}
STREAMED = {"in_flight": 1, "programs": 256, "prefetching": 256, "looped_prefetches": 0, "resident": 2}
ONE = row(tokens=1, kernel="_matvec_kernel", x_loads=14, x_early=14, norm_first=True, holds_scales=True)
FEW = row(tokens=4, kernel="_few_tokens_kernel", chain=330.0, budget=461.0)


@pytest.mark.parametrize(
    ("sound", "changes", "message"),
    [
        (ONE, {"x_early": 2}, "requests 2 of x's 14 loads before its weights"),
        (ONE, {"norm_first": False}, "computes its norm only after its weights"),
        (ONE, {"looped_prefetches": 1}, "prefetches row by row"),
        (FEW, {"chain": 528.0}, "multiplies for 528 cycles a stage, more than 461"),
        (FEW, {"programs": 2004, "prefetching": 2004}, "prefetches in programs that do not wait"),
    ],
)
def test_slow_reads_of_a_weight_are_named(sound: Row, changes: dict[str, Any], message: str) -> None:
    sound = sound | STEP | STREAMED
    assert violations([sound]) == []
    (found,) = violations([sound | changes])
    assert found.endswith(f"{sound['kernel']} {message}")
    assert violations([ONE | STEP | STREAMED | {"norm_first": False, "holds_scales": False}]) == []


def test_decode_attention_needs_no_more_than_default_shared_memory() -> None:
    sound = row(tokens=4, kernel="_attention_decode_kernel", shared=49152, barrier=True, dependent=True, waits=1)
    sound |= {"prefetched": ["cache_k"], "op": "layer attention"}
    assert violations([sound]) == []
    (found,) = violations([sound | {"shared": 71680}])
    assert found.endswith("takes 71680 bytes of shared memory, more than the default 49152")
    assert violations([sound | {"shared": 71680, "op": "attention, one row"}]) == []  # a step that checks guesses


def test_a_sixth_launch_in_a_layer_is_counted() -> None:
    ops = ["layer qkv", "layer attention", "layer output", "layer gate+up", "layer down"]
    common = {"tokens": 4, "dependent": True, "waits": 1, "prefetched": ["cache_k"]}
    layer = [row(op=op, **common) for op in ops]
    expected = 5 * MODELS["3-8B"].n_layers + 4
    step = row(tokens=4, op=WHOLE_STEP, launches=expected)
    assert launch_counts([*layer, step])["sm_90", "3-8B", 4] == (5, expected) and not violations([*layer, step])
    sixth = [*layer, row(op="layer down", **common), step]
    for rows, counts in (
        (sixth, f"6 launches a layer, {expected} a step"),
        ([*layer, step | {"launches": expected + 32}], f"5 launches a layer, {expected + 32} a step"),
        ([*layer, step | {"other": 1}], f"5 launches a layer, {expected + 1} a step"),
    ):
        assert violations(rows) == [f"sm_90 3-8B at 4 rows takes {counts}, not 5 and {expected}"]
