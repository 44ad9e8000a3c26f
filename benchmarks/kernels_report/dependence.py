"""Proves from a kernel's LLVM IR that it may be launched as dependent on the kernel before it.

`kernels/launch/dependent.py` explains the rule: a kernel waits once, before any branch, loop or return. Before the
wait, it may prefetch and load immutable weights. It may also load numbers that are not final yet, if they are used only
for prefetches before the wait.
"""

import re
from collections.abc import Iterator

from fastllama.benchmarks.kernels_report.llvm_ir import KernelIR, Load, loaded_bytes, pointers_in

IMMUTABLE = {"weight_ptr", "scales_ptr", "bias_ptr", "norm_ptr"}
PREFETCH_INPUTS = {"positions_ptr", "pages_ptr"}  # may be loaded before the wait, to decide what is prefetched
PREFETCHED = {"weight_ptr", "cache_k_ptr", "cache_v_ptr"}
WAIT, TRIGGER, PREFETCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "cp.async.bulk.prefetch.L2"
# Affects one program or one thread only. Tensor memory belongs to a multiprocessor.
HARMLESS_ASSEMBLY = r"createpolicy|shfl\.sync|bar\.sync|barrier|[ls][dt]\.shared|tcgen05\.(alloc|relinquish)|^$"
ENDS_ENTRY_BLOCK = r"^(br|switch|ret|unreachable)\b|^[\w.]+:"


def waits(ir: KernelIR) -> int:
    """The number of waits in a kernel."""
    return sum(WAIT in line for line in ir.lines)


def violations(ir: KernelIR) -> list[str]:
    """Each way in which a kernel that is launched as dependent breaks the rule."""
    places = [index for index, line in enumerate(ir.lines) if WAIT in line]
    if len(places) != 1:
        return [f"has {len(places)} waits, not one"]
    (wait,) = places
    found = []
    if any(re.search(ENDS_ENTRY_BLOCK, line) for line in ir.lines[:wait]):
        found.append("waits after a branch, a loop or a return")
    triggers = [index for index, line in enumerate(ir.lines) if TRIGGER in line]
    if any(index < wait for index in triggers):
        found.append("lets the next kernel begin before it has waited")
    if not triggers:
        found.append("never lets the next kernel begin")
    return found + list(_early_effects(ir, wait)) + list(_early_loads(ir, wait))


def prefetches(ir: KernelIR) -> set[str]:
    """The arguments whose memory a kernel prefetches."""
    return {ir.argument_of(pointers_in(line)[0]).removesuffix("_ptr") for line in ir.lines if PREFETCH in line}


def _early_effects(ir: KernelIR, wait: int) -> Iterator[str]:
    for line in ir.lines[:wait]:
        if re.search(r"\bst(ore)?\b[\w.: ]*\bglobal|^store .*addrspace\(1\)|\batom|\bred\.", line):
            yield "writes before it waits"
        elif PREFETCH in line:
            argument = ir.argument_of(pointers_in(line)[0])
            if argument not in PREFETCHED:
                yield f"prefetches {argument} before it waits"
        elif TRIGGER not in line and not loaded_bytes(line):
            for assembly in re.findall(r'asm sideeffect "(.*?)"', line):
                if not re.search(HARMLESS_ASSEMBLY, assembly):
                    yield f"does something unknown before it waits: {assembly[:40]}"


def _early_loads(ir: KernelIR, wait: int) -> Iterator[str]:
    for load in ir.loads:
        if load.line < wait and load.argument not in IMMUTABLE:
            if load.argument not in PREFETCH_INPUTS:
                yield f"loads {load.argument} before it waits"
            elif not _only_for_prefetches(ir, load, wait):
                yield f"loads {load.argument} before it waits, and uses it for more than prefetches"


def _only_for_prefetches(ir: KernelIR, load: Load, wait: int) -> bool:
    """Whether a loaded value, and all values computed from it, are used only for prefetches before the wait."""
    derived = {load.value}
    for index, value, instruction in ir.assignments():
        if index > load.line and derived & set(re.findall(r"%([\w.]+)", instruction)):
            if index > wait or not value:
                return False
            if PREFETCH not in instruction:
                derived.add(value)
    return True
