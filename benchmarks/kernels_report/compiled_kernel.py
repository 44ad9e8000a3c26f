"""What the compiler made of a kernel: registers, spills, shared memory, load widths, matrix instructions.

Widths are told by argument (`llvm_ir.py`), and so is what a kernel does before it waits (`dependence.py`).
Registers and spills come from the binary (NVIDIA) or the assembly's metadata (AMD), with the tools that come with
triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fastllama.benchmarks.kernels_report.ahead_of_time import Gpu
from fastllama.benchmarks.kernels_report.llvm_ir import KernelIR
from fastllama.benchmarks.kernels_report.sass import Sass

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOAD_BYTES = 16
REGISTER_GRANULE = 8  # registers of a thread are handed out in
MATRIX_INSTRUCTIONS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"


class Processor(NamedTuple):
    """What a multiprocessor, or compute unit, holds at once."""

    registers: int  # of all its threads, 32 bits each
    threads: int
    programs: int
    reserved_bytes: int  # of shared memory beside each program's own


# NVIDIA's CUDA programming guide, "Compute capabilities"; AMD's CDNA 3 ISA guide: four SIMDs of 512 · 64 registers.
PROCESSOR = Processor(65536, 2048, 32, 1024)
PROCESSORS: dict[int | str, Processor] = {
    86: Processor(65536, 1536, 16, 1024),
    89: Processor(65536, 1536, 24, 1024),
    120: Processor(65536, 1536, 24, 1024),
    "gfx942": Processor(131072, 2048, 32, 0),
}


class Compiled:
    """One compiled kernel on one GPU."""

    def __init__(self, compiled: Any, gpu: Gpu) -> None:
        self.gpu = gpu
        self.warps: int = compiled.metadata.num_warps
        self.stages: int = compiled.metadata.num_stages
        self.shared: int = compiled.metadata.shared
        self.dependent = bool(getattr(compiled.metadata, "launch_pdl", False))
        self._asm: dict[str, Any] = compiled.asm
        self._arguments = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]

    @property
    def threads(self) -> int:
        """Of a program."""
        return self.warps * self.gpu.warp_size

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._usage["registers"]

    @property
    def spills(self) -> int:
        """Bytes of a thread's stack, which is where spilled registers go.

        AMD's scalar registers are not counted: they are kept in lanes of vector registers, not in memory.
        """
        return self._usage["spills"]

    @property
    def programs_per_processor(self) -> int:
        """How many fit beside each other: by registers, threads and shared memory."""
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
        """For each argument, how many loads of how many bytes a thread issues; "?" where an address has no argument."""
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
        """Whether a barrier stands between each atomic and the stores before it; None where there is no atomic."""
        if self.gpu.backend == "cuda":
            text, atomic, store, barrier = self._asm["ptx"], r"\batom\.", r"\bst\.global", r"\bbar(rier)?\.sync"
        else:
            text, atomic, store, barrier = self._asm["amdgcn"], "atomic", r"(global|buffer)_store", "s_barrier"
        return _barrier_before_atomics(text, atomic, store, barrier)

    @cached_property
    def sass(self) -> Sass:
        """The binary's instructions, NVIDIA only."""
        return Sass(self._run("nvdisasm", "-c", "-hex"))

    @property
    def instructions(self) -> list[str]:
        """Their text."""
        return [one.text for one in self.sass.instructions]

    @cached_property
    def early_weight_bytes(self) -> int:
        """Bytes of once-read weights that a thread requests before the first barrier or wait, NVIDIA only."""
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
