"""Packages, dependencies and the console script. pyproject.toml holds the settings of the tools and nothing else."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"', (ROOT / "fastllama" / "__init__.py").read_text(), re.MULTILINE)

PLOTS = ["matplotlib>=3.9"]
# Meta's own code as the oracle of the tests and a peer of the benchmarks; it needs fairscale's groups to exist.
REFERENCE = ["llama-models==0.3.0", "fairscale==0.4.13"]
GGUF = "gguf>=0.17"

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
        "fastllama.kernels",
        "fastllama.kernels.attention",
        "fastllama.kernels.launch",
        "fastllama.kernels.projection",
        "fastllama.kernels.sampling",
    ],
    package_data={"fastllama.builtin": ["checkpoint/*", "data/*"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",  # torch warns without it, and triton's interpreter needs it
        "triton>=3.6; sys_platform == 'linux'",
        "tiktoken>=0.9",
        "safetensors>=0.5",
        "click>=8.2",
        "tqdm>=4.66",
        "psutil>=6",
    ],
    extras_require={
        "plots": PLOTS,
        "reference": REFERENCE,
        # pip compiles llama.cpp: it needs cmake and a C++ compiler.
        "llama-cpp": [GGUF, "llama-cpp-python>=0.3.16"],
        "train": ["regex>=2024.4"],
        "dev": [
            *PLOTS,
            *REFERENCE,
            GGUF,
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pre-commit>=4",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "regex>=2024.4",
            "tokenizers>=0.21",
            "transformers>=5",
            "types-psutil",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["fastllama = fastllama.cli:main"]},
)
