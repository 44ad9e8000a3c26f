"""The house: imports point down, files keep their size, and the backends are twins."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from fastllama.kernels.select import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
# Every room and its floor, as docs/architecture.md draws them: a file imports only from floors below its own.
FLOORS = {
    "kernels.checks": 0.0,
    "kernels.interpreter": 0.0,
    "kernels.nucleus": 0.0,
    "kernels.philox": 0.0,
    "kernels.sizes": 0.0,
    "kernels.switches": 0.0,
    "kernels.ragged": 0.0,
    "kernels.decode_state": 0.05,
    "kernels.reference": 0.1,
    "kernels.target": 0.1,
    "kernels.dependent": 0.15,
    "kernels.projection": 0.16,
    "kernels.rms_norm": 0.2,
    "kernels.rotary": 0.2,
    "kernels.swiglu": 0.2,
    "kernels.matvec": 0.2,
    "kernels.few_tokens": 0.2,
    "kernels.attention_tile": 0.15,
    "kernels.attention_scratch": 0.16,
    "kernels.attention_decode": 0.2,
    "kernels.attention_prefill": 0.2,
    "kernels.top_p": 0.1,
    "kernels.sampling_scratch": 0.1,
    "kernels.sampling": 0.2,
    "kernels.embedding": 0.3,
    "kernels.fused": 0.4,
    "kernels.select": 0.5,
    "strict_json": 0.9,
    "args": 1,
    "launch": 1,
    "rendezvous": 1.05,
    "cgroups": 1,
    "threads": 1.1,
    "ambient": 1.2,
    "tokenizer_files": 1,
    "tokenizer": 1.1,
    "parallel": 1.1,
    "rope": 1.1,
    "slots": 1,
    "cache": 1,
    "validate": 1,
    "model": 2,
    "checkpoint": 3,
    "arrivals": 3,
    "cuda_graph": 3,
    "prefill": 3,
    "decode_graph": 3.1,
    "warm": 3.2,
    "builtin": 3,
    "limits": 4,
    "speed_of_light": 4,
    "stream": 4,
    "loading": 5,
    "generation": 6,
    "started": 6,
    "leader": 6.1,
    "follower": 6.2,
    "benchmarks": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 10,
}
WITHIN = ("checkpoint", "builtin", "benchmarks", "cli")  # rooms that are packages: their files may know each other
MAX_LINES = 300
MAX_FUNCTION_LINES = 60


def source_files() -> list[Path]:
    files = [
        path for folder in ("fastllama", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    linked = [ROOT / "fastllama" / "kernels", ROOT / "fastllama" / "benchmarks"]
    return [path for path in files if not any(link in path.parents for link in linked)]


def module_of(path: Path) -> str:
    """fastllama/cli/chat.py -> cli.chat, kernels/select.py -> kernels.select"""
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "fastllama" else relative.parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return ".".join(module.split(".")[:2]) if first == "kernels" else first


def imports_of(path: Path) -> set[str]:
    """The modules of fastllama that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if node.module in ("fastllama", "fastllama.kernels") else {str(node.module)}
    return {name.removeprefix("fastllama.") for name in found if name.startswith("fastllama.")}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(module_of(path))
    assert room in FLOORS, f"{path.name} has no floor yet: give it one here and in docs/architecture.md"
    for name in imports_of(path):
        other = room_of(name)
        if other not in FLOORS:  # a public name taken from the package itself
            other = "generation" if name != "builtin_checkpoint" else "builtin"
        if room == other and room in WITHIN:
            continue
        assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node)
            # A kernel's parameters stand one a line, and are no code.
            begin = node.body[0].lineno if node.name.endswith("_kernel") else node.lineno
            code = (node.end_lineno or 0) - begin + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert code <= MAX_FUNCTION_LINES, f"{node.name} has {code} lines of code"


def test_kernels_stay_a_namespace_folder() -> None:
    """An __init__.py there would shadow the PyPI package `kernels`, which transformers imports."""
    for folder in ("kernels", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "fastllama" / folder).resolve() == ROOT / folder


def test_reference_needs_no_triton() -> None:
    assert "triton" not in (ROOT / "kernels" / "reference.py").read_text()


def test_backends_are_twins() -> None:
    """Every backend exports the reference's functions with the reference's signatures."""
    reference = importlib.import_module("fastllama.kernels.reference")
    ops = {
        name: inspect.signature(function)
        for name, function in inspect.getmembers(reference, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == reference.__name__
    }
    assert {"embed", "qkv", "attention", "project", "swiglu", "head", "sample", "pack", "unpack"} <= set(ops)
    for name in BACKENDS:
        other = importlib.import_module(f"fastllama.kernels.{name}")
        differing = {op for op, signature in ops.items() if inspect.signature(getattr(other, op)) != signature}
        assert not differing, f"ops of {name} whose signatures are not the reference's: {differing}"


def test_every_file_stands_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = [path.name for path in source_files() if path.name != "__init__.py" and path.name not in text]
    assert not missing, f"docs/architecture.md has one line for every file; it lacks {missing}"


def test_setup_lists_every_package() -> None:
    """Packages are named one by one (links defeat the automatic search), so that none may be forgotten."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup"]
    (listed,) = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "packages"]
    folders = {path.parent.relative_to(ROOT) for path in source_files()}
    expected = {".".join(("fastllama", *(part for part in folder.parts if part != "fastllama"))) for folder in folders}
    assert set(listed) == expected
