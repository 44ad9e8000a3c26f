"""Reads a compiled kernel's machine instructions and their dependencies (NVIDIA, from Volta on).

An instruction may set one of six barriers and wait for any of them. A load sets its barrier when its data has arrived.
An instruction that needs the data waits for that barrier, and thus for all other loads that set it. Therefore the
barriers, not the registers, show which instructions run before a load's data is needed.
"""

import re
from typing import NamedTuple

# Bits of an instruction's second half: the barrier that it sets (7: none), and the barriers that it waits for.
SETS_AT, WAITS_AT, BARRIERS = 46, 52, 6
NO_BARRIER = 7
# Cycles between a matrix instruction of 16 x 8 x 16 and the next that adds to its sums. Assumed, not measured. The GPU
# report times launches with one and with several chains of dependent instructions.
CHAIN_CYCLES = 33
_LINE = r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/\s+/\* (0x[0-9a-f]+) \*/|^(\.L\w+):"
_WEIGHT, _WAIT = r"LDG\.E\.EF\b", "ACQBULK"
_LOAD = r"LDG\.E\.(64|128)\b"  # of x, which every program reads: unlike weights, not marked "evict first"
_NORM = "MUFU.RSQ"
_PREFETCH, _LOOP = "UBLKPF", "BRA.U.ANY"
# The result, two factors and the sums so far. One factor of a wgmma is a descriptor.
_MATRIX = r"\bHG?MMA\S* (?P<result>R\d+), .*, (?P<sums>R(?:\d+|Z))"


class Instruction(NamedTuple):
    """One instruction of a kernel."""

    text: str
    sets: int | None  # the barrier that it sets when it is done
    waits: frozenset[int]  # the barriers that it waits for


class Sass:
    """The instructions of a kernel, up to the last exit."""

    def __init__(self, listing: str) -> None:
        """listing: nvdisasm's output with the instructions' encodings."""
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for text, half, label in re.findall(_LINE, listing, re.MULTILINE):
            if label:
                self._labels[label] = len(self.instructions)
                continue
            bits = int(half, 16)
            sets, waits = bits >> SETS_AT & 7, bits >> WAITS_AT
            barriers = frozenset(barrier for barrier in range(BARRIERS) if waits >> barrier & 1)
            self.instructions.append(Instruction(text, None if sets == NO_BARRIER else sets, barriers))
        last = max(index for index, one in enumerate(self.instructions) if "EXIT" in one.text)
        del self.instructions[last + 1 :]

    def early_inputs(self) -> tuple[int, int]:
        """The loads of x after a dependent launch's wait: (before the first wait for a weight, in all)."""
        begin, used = self._wait(), self._first_use()
        places = [i for i, one in enumerate(self.instructions) if i > begin and re.search(_LOAD, one.text)]
        return sum(place < used for place in places), len(places)

    def norm_is_first(self) -> bool | None:
        """Whether the norm is computed before the first wait for a weight; None without a norm."""
        places = [i for i, one in enumerate(self.instructions) if _NORM in one.text]
        return places[0] < self._first_use() if places else None

    def prefetches(self) -> tuple[int, int]:
        """The prefetch instructions: (those that a warp issues once, those that it issues once per thread)."""
        found = [i for i, one in enumerate(self.instructions) if _PREFETCH in one.text]
        loops = sum(any(_LOOP in one.text for one in self.instructions[i : i + 4]) for i in found)
        return len(found) - loops, loops

    def chain(self) -> tuple[float, int]:
        """(least cycles, number) of the matrix instructions in one iteration of the innermost loop that multiplies, or
        in the complete kernel if that loop is unrolled.

        They are issued in order. An instruction that adds to the sums of an earlier one waits for it.
        """
        begin, end = self._innermost_loop()
        rounds = 2 if end else 1  # the second iteration begins with the sums of the first
        found = [match for one in self.instructions[begin : end or None] if (match := re.search(_MATRIX, one.text))]
        at, ends, ready = 0, [0], dict[str, int]()
        for _ in range(rounds):
            for match in found:
                at = max(at + 1, ready.get(match["sums"], 0))
                ready[match["result"]] = at + CHAIN_CYCLES
            ends.append(at)
        return ends[-1] - ends[-2], len(found)

    def loops(self) -> list[tuple[int, int]]:
        """The indices of each loop's first instruction and of its branch back to it."""
        found = []
        for index, one in enumerate(self.instructions):
            match = re.search(r"\bBRA\S* .*?(\.L\w+)", one.text)
            if match and self._labels.get(match[1], index + 1) <= index:
                found.append((self._labels[match[1]], index))
        return found

    def _innermost_loop(self) -> tuple[int, int]:
        multiplying = [
            (begin, end)
            for begin, end in self.loops()
            if any(re.search(_MATRIX, one.text) for one in self.instructions[begin:end])
        ]
        return min(multiplying, key=lambda loop: loop[1] - loop[0], default=(0, 0))

    def _wait(self) -> int:
        return next((i for i, one in enumerate(self.instructions) if _WAIT in one.text), 0)

    def _first_use(self) -> int:
        """The index of the first instruction after the dependent launch's wait that waits for a weight."""
        begin = self._wait()
        barriers = {one.sets for one in self.instructions if re.search(_WEIGHT, one.text)}
        return next((i for i, one in enumerate(self.instructions) if i > begin and one.waits & barriers), begin)
