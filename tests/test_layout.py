"""The structure of the project: import layers, sizes of files and functions, backends with the same signatures."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from fastllama.kernels.select import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
# Every file or folder and its layer, as in docs/architecture.md: a file imports only from lower layers.
LAYERS = {
    "kernels.launch.sizes": 0.0,
    "kernels.launch.options": 0.0,
    "kernels.launch.checks": 0.05,
    "kernels.launch.interpreter": 0.0,
    "kernels.batch": 0.0,
    "kernels.paged_cache": 0.0,
    "kernels.quantized": 0.0,
    "kernels.graph": 0.0,
    "kernels.onednn": 0.0,
    "kernels.sampling.top_p_torch": 0.0,
    "kernels.sampling.philox": 0.0,
    "kernels.sampling.controls": 0.05,
    "kernels.sampling.masks": 0.05,
    "kernels.guesses": 0.05,
    "kernels.decode_state": 0.1,
    "kernels.checking": 0.15,
    "kernels.sampling.extras": 0.15,
    "kernels.reference": 0.2,
    "kernels.launch.target": 0.2,
    "kernels.launch.dependent": 0.3,
    "kernels.attention": 0.4,
    "kernels.rms_norm": 0.4,
    "kernels.rope": 0.4,
    "kernels.swiglu": 0.4,
    "kernels.embedding": 0.45,
    "kernels.projection": 0.45,
    "kernels.sampling": 0.4,
    "kernels.native": 0.4,
    "kernels.checking_triton": 0.45,
    "kernels.fused": 0.5,
    "kernels.select": 0.6,
    "strict_json": 0.9,
    "template_limits": 1.0,
    "template_filters": 1.1,
    "template_sandbox": 1.2,
    "args": 1.0,
    "cgroups": 1.0,
    "int4_rounding": 0.9,
    "gptq": 1.0,
    "quantization": 1.05,
    "packed_weights": 1.1,
    "page_pool": 0.9,
    "cache": 1.0,
    "validate": 1.0,
    "gguf_header": 0.9,
    "tokenizer_search": 0.95,
    "tokenizer_files": 1.0,
    "tokenizer_base": 1.0,
    "distributed.environment": 1.0,
    "distributed.rendezvous": 1.1,
    "distributed.model_parallel": 1.2,
    "tokenizer": 1.1,
    "predictions": 1.2,
    "tokenizer_huggingface": 1.1,
    "tokenizer_sentencepiece": 1.1,
    "tokenizer_gguf": 1.15,
    "tokenizer_open": 1.2,
    "threads": 1.1,
    "rope": 1.1,
    "torch_settings": 1.2,
    "sampling": 1.3,
    "model": 2,
    "checkpoint": 3,
    "chat_template_files": 3.1,
    "chat_template": 3.1,
    "output_copies": 3,
    "row_lengths": 1.0,
    "cuda_graph": 3,
    "token_scores": 3,
    "speculation_stats": 1.0,
    "guess_timer": 1.0,
    "vocabulary_difference": 1.1,
    "draft": 3.04,
    "guess_control": 3.05,
    "speculation": 3.03,
    "step_graphs": 3.05,
    "prefill": 3.05,
    "calibration": 2,
    "builtin": 3,
    "decode_graph": 3.1,
    "warmup": 3.2,
    "llama3_tools": 3.1,
    "chat_format": 3.2,
    "memory_plan": 4,
    "speed_of_light": 4,
    "speculation_limits": 4.1,
    "stream": 4,
    "engine.grammar": 4.4,
    "engine.sampling_params": 4.5,
    "engine.grammar_matcher": 4.5,
    "engine.stop_strings": 4.5,
    "engine.sequence": 4.6,
    "engine.stats": 4.6,
    "engine.wake": 4.6,
    "engine.commands": 4.65,
    "engine.messages": 4.66,
    "engine.request": 4.7,
    "engine.scheduler": 4.7,
    "engine.recovery": 4.75,
    "engine.inbox": 4.75,
    "engine.model_runner": 4.8,
    "engine.core": 4.9,
    "engine.facts": 4.9,
    "engine.prompts": 4.95,
    "engine.any_engine": 4.96,
    "engine.engine": 5.0,
    "engine.remote_engine": 5.0,
    "engine.engine_host": 5.1,
    "engine.many": 5.1,
    "engine.scoring": 5.2,
    "engine": 5.3,
    "openai_api.errors": 5.4,
    "openai_api.answer_parts": 5.4,
    "openai_api.known_fields": 5.4,
    "openai_api.fields": 5.5,
    "openai_api.call_formats": 5.5,
    "openai_api.call_detection": 5.51,
    "openai_api.call_parser": 5.51,
    "openai_api.messages": 5.51,
    "openai_api.response_format": 5.51,
    "openai_api.tools": 5.51,
    "openai_api.answer_form": 5.52,
    "openai_api.requests": 5.6,
    "openai_api.logprobs": 5.6,
    "openai_api.envelope": 5.5,
    "openai_api.responses": 5.7,
    "openai_api.chunks": 5.8,
    "openai_api.input_items": 5.52,
    "openai_api.responses_api": 5.7,
    "openai_api.responses_events": 5.8,
    "loading": 5,
    "generation": 6,
    "quality": 6.1,
    "evaluation": 5.4,
    "lm_eval_model": 6.1,
    "distributed.interrupts": 1.0,
    "distributed.worker_processes": 6,
    "distributed.driver": 6.1,
    "distributed.shared_engine": 6.2,
    "distributed.worker": 6.2,
    "server.settings": 6.3,
    "server.json_response": 6.3,
    "server.metrics": 6.3,
    "server.fingerprint": 6.3,
    "server.page": 6.3,
    "server.streaming": 6.3,
    "server.schemas": 6.2,
    "server.documents": 6.3,
    "server.errors": 6.4,
    "server.guards": 6.5,
    "server.bodies": 6.6,
    "server.service": 6.5,
    "server.tokenization": 6.6,
    "server.exchange": 6.4,
    "server.generation_routes": 6.7,
    "server.other_routes": 6.7,
    "server.app": 6.8,
    "server.connection": 6.8,
    "server.run": 6.9,
    "server.http_process": 6.95,
    "benchmarks.near_ties": 7.0,
    "benchmarks.environment": 7.0,
    "benchmarks.models": 7.0,
    "benchmarks.statistics": 7.0,
    "benchmarks.tables": 7.0,
    "benchmarks.timing": 7.0,
    "benchmarks.tolerances": 7.0,
    "benchmarks.ceilings": 7.1,
    "benchmarks.runners": 7.1,
    "benchmarks.result_file": 7.2,
    "benchmarks.child_process": 7.3,
    "benchmarks.peers": 7.4,
    "benchmarks.suites": 7.5,
    "benchmarks.kernels_report": 7.6,
    "benchmarks.gpu_report": 7.7,
    "benchmarks.plots": 7.7,
    "benchmarks.report": 7.7,
    "benchmarks.compare_results": 7.7,
    "benchmarks.update_docs": 7.8,
    "benchmarks.bench": 7.8,
    "benchmarks.test_kernels": 7.8,
    "benchmarks.lm_eval_comparison": 7.8,
    "cli": 8,
    "__main__": 9,
    "__init__": 10,
}
# Folders whose files may import each other. In other folders each file has its own layer.
FREE_WITHIN = {
    *("kernels.attention", "kernels.native", "kernels.projection", "kernels.sampling"),
    *("benchmarks.peers", "benchmarks.suites", "benchmarks.kernels_report", "benchmarks.gpu_report"),
    *("checkpoint", "builtin", "cli"),
}
# The files of the reference backend's ops.
DEFINING_OPS = {f"fastllama.kernels.{name}" for name in ("reference", "checking", "sampling.masks")}
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


def layer_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: the longest prefix of its name, else the name itself."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYERS), module)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path: Path) -> set[str]:
    """The modules of fastllama that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if _is_module(inner) or node.module == "fastllama" else str(node.module))
    return {name.removeprefix("fastllama.") for name in found if name.startswith("fastllama.")}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py" and not imports_of(path):
        return
    ours = layer_of(module_of(path))
    assert ours in LAYERS, f"{path.name} has no layer yet: give it one here and in docs/architecture.md"
    for name in imports_of(path):
        other = layer_of(name)
        if other not in LAYERS:  # a public name taken from the package itself
            other = "generation" if name != "builtin_checkpoint" else "builtin"
        if ours == other and ours in FREE_WITHIN:
            continue
        assert LAYERS[other] < LAYERS[ours], f"{ours} (layer {LAYERS[ours]}) imports {other} (layer {LAYERS[other]})"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node)
            # A kernel has one parameter a line, and these are not counted.
            begin = node.body[0].lineno if node.name.endswith("_kernel") else node.lineno
            code = (node.end_lineno or 0) - begin + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert code <= MAX_FUNCTION_LINES, f"{node.name} has {code} lines of code"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_host_function_has_types(path: Path) -> None:
    """mypy cannot check this, because it cannot exclude device functions, which triton.jit compiles."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        missing = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
        assert not missing and node.returns is not None, f"{node.name} lacks the types of {missing or 'its result'}"


def test_kernels_stay_a_namespace_folder() -> None:
    """An __init__.py there would shadow the PyPI package `kernels`, which transformers imports."""
    for folder in ("kernels", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "fastllama" / folder).resolve() == ROOT / folder


def test_reference_needs_no_triton() -> None:
    assert "triton" not in (ROOT / "kernels" / "reference.py").read_text()


def test_backends_have_the_same_functions() -> None:
    """Every backend exports the reference's functions with the reference's signatures."""
    reference = importlib.import_module("fastllama.kernels.reference")
    ops = {
        name: inspect.signature(function)
        for name, function in inspect.getmembers(reference, inspect.isfunction)
        if not name.startswith("_") and function.__module__ in DEFINING_OPS
    }
    assert {"embed", "norm_qkv_rope_append", "attention", "linear_residual", "norm_swiglu", "norm_lm_head"} <= set(ops)
    assert {"sample", "sample_and_advance", "pack", "unpack", "workspace"} <= set(ops)
    assert {"mask_logits", "window", "accept", "look_up", "put_guess"} <= set(ops)
    for name in BACKENDS:
        other = importlib.import_module(f"fastllama.kernels.{name}")
        differing = {op for op, signature in ops.items() if inspect.signature(getattr(other, op)) != signature}
        assert not differing, f"ops of {name} whose signatures are not the reference's: {differing}"


def compiled_sources() -> list[Path]:
    return sorted(path for path in (ROOT / "kernels").rglob("*.*pp") if path.suffix in (".cpp", ".hpp"))


@pytest.mark.parametrize("path", compiled_sources(), ids=lambda path: path.name)
def test_compiled_sources_are_small(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_LINES


def test_every_file_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = [str(path.relative_to(ROOT)).removeprefix("fastllama/") for path in source_files() + compiled_sources()]
    missing = [
        path for path in paths if not path.endswith(("/__init__.py", "/__main__.py")) and f"`{path}`" not in text
    ]
    assert not missing, f"docs/architecture.md has one line for every file; it lacks {missing}"


def test_setup_lists_every_package() -> None:
    """Packages are listed one by one, because setuptools does not follow the links."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup"]
    (listed,) = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "packages"]
    folders = {path.parent.relative_to(ROOT) for path in source_files()}
    expected = {".".join(("fastllama", *(part for part in folder.parts if part != "fastllama"))) for folder in folders}
    assert set(listed) == expected
