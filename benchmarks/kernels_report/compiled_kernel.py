"""Reads registers, spills, shared memory, load widths and matrix instructions from a compiled kernel.

Load widths come from the LLVM IR, by argument (`llvm_ir.py`). Registers and spills come from the binary (NVIDIA), read
with the tools that triton ships, or from the assembly's metadata (AMD).
"""

import re
import subprocess
import tempfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fastllama.benchmarks.kernels_report.llvm_ir import KernelIR
from fastllama.benchmarks.kernels_report.sass import Sass
from fastllama.kernels.launch.target import Target

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOAD_BYTES = 16  # of the widest load
REGISTER_GRANULE = 8  # a thread's registers are allocated in multiples of this
MATRIX_INSTRUCTIONS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"


class Processor(NamedTuple):
    """The limits of a multiprocessor or compute unit."""

    registers: int  # of all threads, 32 bits each
    threads: int
    programs: int
    reserved_bytes: int  # of shared memory, in addition to each program's own


# NVIDIA's CUDA programming guide, "Compute capabilities"; AMD's CDNA 3 ISA guide: four SIMDs of 512 · 64 registers.
PROCESSOR = Processor(65536, 2048, 32, 1024)
PROCESSORS: dict[int | str, Processor] = {
    86: Processor(65536, 1536, 16, 1024),
    89: Processor(65536, 1536, 24, 1024),
    120: Processor(65536, 1536, 24, 1024),
    "gfx942": Processor(131072, 2048, 32, 0),
}


class Compiled:
    """A kernel that triton compiled for one GPU."""

    def __init__(self, compiled: Any, gpu: Target) -> None:
        self.gpu = gpu
        self.warps: int = compiled.metadata.num_warps
        self.stages: int = compiled.metadata.num_stages
        self.shared: int = compiled.metadata.shared
        self.dependent = bool(getattr(compiled.metadata, "launch_pdl", False))
        self._asm: dict[str, Any] = compiled.asm
        self._arguments = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]

    @property
    def threads(self) -> int:
        """Threads per program."""
        return self.warps * self.gpu.warp_size

    @property
    def registers(self) -> int:
        """Registers per thread."""
        return self._usage["registers"]

    @property
    def spills(self) -> int:
        """Bytes of a thread's stack, where spilled registers go.

        AMD's spilled scalar registers are not counted, because they go to lanes of vector registers, not to memory.
        """
        return self._usage["spills"]

    @property
    def programs_per_processor(self) -> int:
        """How many programs fit on a multiprocessor at once, limited by registers, threads and shared memory."""
        processor = PROCESSORS.get(self.gpu.arch, PROCESSOR)
        granules = -(-self.registers // REGISTER_GRANULE) * REGISTER_GRANULE
        by_registers = processor.registers // (granules * self.threads)
        all_shared = self.gpu.shared_bytes + processor.reserved_bytes
        by_shared = all_shared // max(self.shared + processor.reserved_bytes, 1)
        return min(by_registers, processor.threads // self.threads, by_shared, processor.programs)

    @cached_property
    def ir(self) -> KernelIR:
        return KernelIR(self._asm["llir"], self._arguments)

    @cached_property
    def loads(self) -> dict[str, Counter[int]]:
        """Argument -> width in bytes -> number of a thread's loads. "?" stands for an address of no argument."""
        loads: dict[str, Counter[int]] = {}
        for load in self.ir.loads:
            loads.setdefault(load.argument, Counter())[load.width] += 1
        return loads

    @cached_property
    def matrix_instructions(self) -> int:
        text = self._asm["ptx"] if self.gpu.backend == "cuda" else self._asm["amdgcn"]
        return len(re.findall(MATRIX_INSTRUCTIONS, text))

    @cached_property
    def barrier_before_atomics(self) -> bool | None:
        """Whether there is a barrier between each atomic and the stores before it; None without an atomic."""
        if self.gpu.backend == "cuda":
            text, atomic, store, barrier = self._asm["ptx"], r"\batom\.", r"\bst\.global", r"\bbar(rier)?\.sync"
        else:
            text, atomic, store, barrier = self._asm["amdgcn"], "atomic", r"(global|buffer)_store", "s_barrier"
        return _barrier_before_atomics(text, atomic, store, barrier)

    @cached_property
    def sass(self) -> Sass:
        """The binary's instructions (NVIDIA only)."""
        return Sass(self._run("nvdisasm", "-c", "-hex"))

    @property
    def instructions(self) -> list[str]:
        """The text of the binary's instructions."""
        return [one.text for one in self.sass.instructions]

    @cached_property
    def early_weight_bytes(self) -> int:
        """Bytes of weights that a thread requests before the first barrier or wait (NVIDIA only)."""
        stops = "BAR.SYNC", "ACQBULK"
        lines = self.instructions
        until = next((index for index, line in enumerate(lines) if any(stop in line for stop in stops)), 0)
        return LOAD_BYTES * sum(bool(re.search(r"LDG\.E\.EF.*\.128", line)) for line in lines[:until])

    @cached_property
    def _usage(self) -> dict[str, int]:
        if self.gpu.backend == "hip":
            text = self._asm["amdgcn"]
            found = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s+(\d+)", text)}
            return {"registers": found["vgpr_count"], "spills": found["private_segment_fixed_size"]}
        usage = self._run("cuobjdump", "--dump-resource-usage")
        registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
        return {"registers": registers, "spills": stack}

    def _run(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._asm["cubin"])
            file.flush()
            done = subprocess.run([BINARIES / tool, *options, file.name], capture_output=True, text=True, check=True)
        return done.stdout


def _barrier_before_atomics(text: str, atomic: str, store: str, barrier: str) -> bool | None:
    stored, guarded = False, None
    for line in text.splitlines():
        if re.search(atomic, line) and "atomics" not in line:
            guarded = guarded is not False and not stored
        elif re.search(store, line):
            stored = True
        elif re.search(barrier, line):
            stored = False
    return guarded
