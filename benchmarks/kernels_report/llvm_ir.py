"""Reads a compiled kernel's LLVM IR: its loads, and the kernel argument that each of them reads."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

ELEMENT_BYTES = {"i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}
UNKNOWN = "?"  # for an address that is computed from no argument
_POINTER = r"ptr addrspace\([18]\)[^%,)]* %([\w.]+)"


class Load(NamedTuple):
    """A thread's load from global memory."""

    line: int
    value: str  # the name of the result; empty for a copy to shared memory
    argument: str  # the argument whose memory it reads
    width: int  # bytes


class KernelIR:
    """The lines of a kernel's body."""

    def __init__(self, ir: str, arguments: list[str]) -> None:
        """arguments: the names of the kernel's arguments, in order. Triton adds others after them."""
        head, body = re.search(  # type: ignore[union-attr]
            r"^define [^@]*@\w+\((.*?)\)[^()]*\{\n(.*?)^\}", ir, re.MULTILINE | re.DOTALL
        ).groups()
        self.lines: list[str] = [line.strip() for line in body.splitlines()]
        self._names: dict[str, str] = dict(zip(re.findall(r"%([\w.]+)(?=,|$)", head), arguments, strict=False))

    @cached_property
    def loads(self) -> list[Load]:
        return [
            Load(index, value, self.argument_of(pointers_in(right)[-1 if "cp.async" in right else 0]), width)
            for index, value, right in self.assignments()
            if (width := loaded_bytes(right))
        ]

    def assignments(self) -> Iterator[tuple[int, str, str]]:
        """(index, name of the result or "", instruction) of every line."""
        for index, line in enumerate(self.lines):
            value, _, right = line.partition(" = ")
            yield (index, value.lstrip("%"), right) if right else (index, "", line)

    def argument_of(self, pointer: str) -> str:
        """The argument that an address is computed from."""
        seen, pending = set(), [pointer]
        while pending:
            value = pending.pop()
            if value in self._names:
                return self._names[value]
            if value not in seen:
                seen.add(value)
                pending.extend(self._sources.get(value, []))
        return UNKNOWN

    @cached_property
    def _sources(self) -> dict[str, list[str]]:
        """The pointers that each value is computed from."""
        sources: dict[str, list[str]] = {}
        for _, value, right in self.assignments():
            if value and not loaded_bytes(right):
                phi = re.findall(r"\[ %([\w.]+),", right) if " phi " in f" {right}" else []
                sources[value] = phi or pointers_in(right)
        return sources


def pointers_in(instruction: str) -> list[str]:
    """The pointers to global memory in an instruction."""
    return re.findall(_POINTER, instruction)


def loaded_bytes(instruction: str) -> int:
    """The bytes that one thread loads from global memory with an instruction; 0 if it loads none."""
    if asynchronous := re.search(r"cp\.async\.\w+\.shared\.global.*?, (0x[0-9a-f]+),", instruction):
        return int(asynchronous[1], 16)
    if inline := re.search(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", instruction):
        return int(inline[1] or 1) * int(inline[2]) // 8
    plain = re.search(r"(?:^|\s)load (?:volatile )?(<\d+ x \w+>|\w+), ptr addrspace\(1\)", instruction)
    buffered = re.search(r"call (<\d+ x \w+>|\w+) @llvm\.amdgcn\.raw\.ptr\.buffer\.load\.(?!lds)", instruction)
    if match := plain or buffered:
        count, element = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", match[1]).groups()  # type: ignore[union-attr]
        return int(count or 1) * ELEMENT_BYTES[element]
    if to_shared := re.search(r"@llvm\.amdgcn\.(?:raw\.ptr\.buffer\.load|global\.load)(?:\.async)?\.lds", instruction):
        return int(re.findall(r"i32 (\d+)", instruction[to_shared.end() :])[0])
    return 0
