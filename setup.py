"""Packages, dependencies and the console script. pyproject.toml holds the settings of the tools and nothing else."""

import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"', (ROOT / "fastllama" / "__init__.py").read_text(), re.MULTILINE)

PLOTS = ["matplotlib>=3.9"]
# Meta's own code as the oracle of the tests and a peer of the benchmarks; it needs fairscale's groups to exist.
REFERENCE = ["llama-models==0.3.0", "fairscale==0.4.13"]
GGUF = "gguf>=0.17"
SENTENCEPIECE = "sentencepiece>=0.2"
SERVE = [
    "fastapi>=0.115",
    "uvicorn>=0.34",
    "uvloop>=0.21; sys_platform != 'win32'",
    "prometheus-client>=0.21",
    "llguidance>=1.3",  # grammars of answers: JSON schemas, tools
]

NATIVE = "fastllama/kernels/native"
NATIVE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-g0",
    "-w",
]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# The file of an instruction set is compiled for that instruction set, which is chosen at run time.
FLAGS_BY_FILE = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"] if IS_X86 else [],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"] if IS_X86 else [],
}


class BuildNative(build_ext):
    """Compiles the kernels of the `native` backend. Where that fails, one line says so and the package has none."""

    def build_extension(self, ext: Any) -> None:
        flags = [*NATIVE_FLAGS, *ext.extra_compile_args]
        try:
            with ThreadPoolExecutor() as pool:
                compiled = [pool.submit(self._compile, source, flags) for source in ext.sources]
            objects = [path for one in compiled for path in one.result()]
            path = self.get_ext_fullpath(ext.name)
            self.compiler.link_shared_object(
                objects, path, extra_postargs=["-pthread", *ext.extra_link_args], target_lang="c++"
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f'fastllama is built without its backend "native": {reason}', file=sys.stderr)

    def _compile(self, source: str, flags: list[str]) -> list[str]:
        own = FLAGS_BY_FILE.get(Path(source).name, [])
        objects: list[str] = self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=[*flags, *own])
        return objects


setup(
    name="fastllama",
    version=VERSION,
    description="Drop-in replacement of Meta's Llama 3 reference code: same interface, same answers, fast, readable",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # fastllama/kernels and fastllama/benchmarks are links to the folders of the top level, so that a bare checkout,
    # an editable install and a wheel all find them under one name.
    packages=[
        "fastllama",
        "fastllama.benchmarks",
        "fastllama.benchmarks.gpu_report",
        "fastllama.benchmarks.kernels_report",
        "fastllama.benchmarks.peers",
        "fastllama.benchmarks.suites",
        "fastllama.builtin",
        "fastllama.checkpoint",
        "fastllama.cli",
        "fastllama.distributed",
        "fastllama.engine",
        "fastllama.kernels",
        "fastllama.kernels.attention",
        "fastllama.kernels.launch",
        "fastllama.kernels.native",
        "fastllama.kernels.projection",
        "fastllama.kernels.sampling",
        "fastllama.openai_api",
        "fastllama.server",
    ],
    package_data={"fastllama.builtin": ["checkpoint/*", "data/*"], "fastllama.server": ["page.html"]},
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "fastllama.kernels.native._kernels",
            sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / NATIVE / "src").glob("*.cpp")),
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / NATIVE / "src").glob("*.hpp")),
            language="c++",
            optional=True,
        )
    ],
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",  # torch warns without it, and triton's interpreter needs it
        "triton>=3.6; sys_platform == 'linux'",
        "tiktoken>=0.9",
        "regex>=2024.5",  # expressions of configurations, with a time limit; tiktoken has it, too
        "tokenizers>=0.21",  # any tokenizer.json
        "safetensors>=0.5",
        "jinja2>=3.1.6",  # earlier versions have known ways out of the sandbox
        "click>=8.2",
        "tqdm>=4.66",
        "psutil>=6",
    ],
    extras_require={
        "plots": PLOTS,
        "reference": REFERENCE,
        # pip compiles llama.cpp: it needs cmake and a C++ compiler.
        "llama-cpp": [GGUF, "llama-cpp-python>=0.3.16"],
        "gguf": [GGUF],
        "sentencepiece": [SENTENCEPIECE],
        "train": ["regex>=2024.4"],
        "eval": ["lm-eval>=0.4.13"],
        "ray": ["ray[data]>=2.51"],
        "serve": SERVE,
        "dev": [
            *PLOTS,
            *REFERENCE,
            GGUF,
            SENTENCEPIECE,
            *SERVE,
            "compressed-tensors>=0.15",
            "hypothesis>=6.100",
            "jsonschema-rs>=0.30",
            "mypy>=1.15",
            "openai>=2",  # the client that the server is for
            "playwright>=1.50",  # drives Debian's chromium
            "pre-commit>=4",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "schemathesis>=4",  # requests from the server's own OpenAPI document
            "regex>=2024.4",
            "transformers>=5",
            "types-psutil",
            "types-tqdm",
        ],
    },
    entry_points={
        "console_scripts": ["fastllama = fastllama.cli:main"],
        "lm_eval.models": ["fastllama = fastllama.lm_eval_model:FastLlama"],
    },
)
