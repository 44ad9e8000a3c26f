"""The proof that dependent launches wait: it accepts a correct kernel, and names each way to break the rule."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama.benchmarks.kernels_report.ahead_of_time import compiling_environment
from fastllama.kernels.launch import dependent
from fastllama.kernels.launch.options import override_launch_options
from fastllama.kernels.launch.target import FUSED_MULTIPLY_ADD, INTERPRETED, Target

ROOT = Path(__file__).resolve().parents[3]
VIOLATIONS = {
    "early_input": ["loads x_ptr before it waits"],
    "early_store": ["writes before it waits"],
    "early_atomic": ["writes before it waits"],
    "early_trigger": ["lets the next kernel begin before it has waited"],
    "early_position": ["loads positions_ptr before it waits, and uses it for more than prefetches"],
    "early_page": ["loads pages_ptr before it waits, and uses it for more than prefetches"],
    "wait_in_loop": ["waits after a branch, a loop or a return"],
    "wait_in_branch": ["waits after a branch, a loop or a return"],
    "no_wait": ["has 0 waits, not one"],
    "two_waits": ["has 2 waits, not one"],
    "no_trigger": ["never lets the next kernel begin"],
    "prefetched_input": ["prefetches x_ptr before it waits"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = compiling_environment(str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, "-m", "tests.benchmarks.kernels_report.bad_dependent_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, Any] = json.loads(done.stdout)
    return kernels


def test_a_sound_kernel_has_no_violations(found: dict[str, Any]) -> None:
    assert found["sound"] == {"dependent": True, "violations": [], "prefetched": ["weight"]}


def test_every_way_to_break_the_rule_is_named(found: dict[str, Any]) -> None:
    assert set(found) == {"sound", *VIOLATIONS}
    for name, expected in VIOLATIONS.items():
        assert set(expected) <= set(found[name]["violations"]), f"{name}: {found[name]['violations']}"


@pytest.mark.parametrize(
    ("target", "is_dependent"),
    [
        (Target("cuda", 80, 108, 166912), False),
        (Target("cuda", 90, 132, 232448), True),
        (Target("cuda", 120, 84, 101376), True),
        (Target("hip", "gfx942", 304, 65536, 64), False),
    ],
)
def test_launches_are_dependent_from_hopper_on(
    target: Target, is_dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependent, "interpreting", lambda: False)
    monkeypatch.setattr(dependent, "current_target", lambda: target)
    ordinary = FUSED_MULTIPLY_ADD | {"DEPENDENT": False}
    expected = FUSED_MULTIPLY_ADD | {"DEPENDENT": True, "launch_pdl": True} if is_dependent else ordinary
    assert dependent.dependent_launch() == expected
    assert dependent.prefetch_bytes(8192, 4096) == (4096 if is_dependent else 0)
    assert dependent.prefetch_bytes(8192, 65536, 4) == (32768 if is_dependent else 0)
    assert dependent.prefetch_bytes(8200, 16384) == 0, "rows that do not begin at a multiple of 16 bytes"
    with override_launch_options(prefetch=False):
        assert dependent.dependent_launch() == expected and dependent.prefetch_bytes(8192, 4096) == 0
    with override_launch_options(dependent=False):
        assert dependent.dependent_launch() == ordinary and dependent.prefetch_bytes(8192, 4096) == 0
    assert dependent.dependent_launch() == expected


def test_interpreted_launches_are_never_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependent, "interpreting", lambda: True)
    monkeypatch.setattr(dependent, "current_target", lambda: INTERPRETED)
    assert dependent.dependent_launch() == FUSED_MULTIPLY_ADD | {"DEPENDENT": False}
