"""The environment of a result."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from fastllama.benchmarks.environment import describe_environment, git_state
from tests.benchmarks.cases import CPU


def test_the_command_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/fastllama/__main__.py", "bench", "--model", "two words"])
    assert describe_environment("cpu").command == "python -m fastllama bench --model 'two words'"
    monkeypatch.setattr("sys.argv", ["/some/where/fastllama", "bench"])
    assert describe_environment("cpu").command == "fastllama bench"


def test_environment_describes_this_process() -> None:
    found = describe_environment("cpu")
    assert (found.device, found.torch, found.threads) == ("cpu", torch.__version__, torch.get_num_threads())
    assert found.cpu and found.cores >= 1 and found.command
    assert found.cuda is None and found.driver is None
    assert json.loads(json.dumps(dataclasses.asdict(found)))["python"] == found.python


def test_git_state_tells_clean_from_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    tracked = tmp_path / "file.py"
    tracked.write_text("1\n")
    assert git_state(tmp_path) == (None, None)
    git("init", "-q")
    git("add", "file.py")
    git("commit", "-q", "-m", "one")
    commit, dirty = git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    tracked.write_text("2\n")
    assert git_state(tmp_path) == (commit, True)
    # An installed copy can be in another project's repository, whose commit is not ours.
    untracked = tmp_path / "site-packages"
    untracked.mkdir()
    (untracked / "ours.py").write_text("1\n")
    assert git_state(untracked) == (None, None)


def test_environment_has_none_for_missing_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr("fastllama.benchmarks.environment.subprocess.run", missing)
    assert (describe_environment(CPU).git_commit, describe_environment(CPU).git_dirty) == (None, None)
