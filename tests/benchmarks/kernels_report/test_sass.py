"""Machine instructions: their order by barriers, prefetches in a loop, and chains of sums."""

from fastllama.benchmarks.kernels_report.sass import CHAIN_CYCLES, NO_BARRIER, SETS_AT, WAITS_AT, Sass


def line(text: str, sets: int = NO_BARRIER, waits: tuple[int, ...] = ()) -> str:
    """An instruction as nvdisasm prints it, with the barriers that it sets and waits for."""
    half = sets << SETS_AT | sum(1 << barrier for barrier in waits) << WAITS_AT
    return f"        /*0000*/                   {text} ;   /* 0x0000000000007918 */\n      /* {half:#018x} */\n"


WEIGHT = line("LDG.E.EF.128 R4, desc[UR4][R2.64]", sets=5)
WAIT = line("ACQBULK")
X = line("LDG.E.128 R80, desc[UR6][R90.64]", sets=2)
USES_X = line("SHF.L.U32 R0, R80, 0x10, RZ", waits=(2,))
USES_WEIGHT = line("SHF.L.U32 R1, R4, 0x10, RZ", waits=(5,))
NORM = line("MUFU.RSQ R93, R93")
EXIT = line("EXIT")


def sass(*lines: str) -> Sass:
    return Sass("".join(lines) + EXIT + line("BRA `(.L_x_9)"))


def test_early_inputs_are_requested_before_the_first_wait_for_a_weight() -> None:
    assert sass(WEIGHT, WAIT, X, X, USES_X, USES_WEIGHT, X).early_inputs() == (2, 3)
    assert sass(WEIGHT, WAIT, USES_WEIGHT, X).early_inputs() == (0, 1)
    # If a load shares the weights' barrier, waiting for the load means waiting for the weights.
    shared = line("LDG.E.128 R80, desc[UR6][R90.64]", sets=5)
    assert sass(WEIGHT, WAIT, X, shared, USES_WEIGHT, X).early_inputs() == (2, 3)


def test_a_norm_comes_before_or_after_the_weights() -> None:
    assert sass(WEIGHT, WAIT, X, NORM, USES_WEIGHT).norm_is_first() is True
    assert sass(WEIGHT, WAIT, X, USES_WEIGHT, NORM).norm_is_first() is False
    assert sass(WEIGHT, WAIT, X, USES_WEIGHT).norm_is_first() is None


def test_prefetches_in_a_loop_over_threads_are_counted_separately() -> None:
    single = line("@!UP0 UBLKPF.L2 [UR4], UR9")
    loop = ".L_x_0:\n" + line("@!UP0 UBLKPF.L2 [UR6], UR4") + line("@P1 BRA.U.ANY `(.L_x_0)")
    assert sass(single, single, WAIT).prefetches() == (2, 0)
    assert sass(loop, single, WAIT).prefetches() == (1, 1)


def multiply(result: str, sums: str) -> str:
    return line(f"HMMA.16816.F32.BF16 {result}, R24, R32, {sums}")


def test_a_chain_of_sums_takes_the_cycles_of_its_instructions() -> None:
    def loop(*lines: str) -> Sass:
        return sass(".L_x_1:\n", *lines, line("@!P0 BRA `(.L_x_1)"))

    one = [multiply("R44", "R44")] * 4
    assert loop(*one).chain() == (4 * CHAIN_CYCLES, 4)
    two = [multiply("R44", "R44"), multiply("R52", "R52")] * 2
    cycles, count = loop(*two).chain()
    assert count == 4 and 2 * CHAIN_CYCLES <= cycles < 3 * CHAIN_CYCLES
    renamed = [multiply("R40", "R44"), multiply("R44", "R40")]
    assert loop(*renamed).chain() == (2 * CHAIN_CYCLES, 2)
    group = line("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR32], R24")
    assert loop(group, group).chain() == (2 * CHAIN_CYCLES, 2)
    assert sass(*one).chain() == (3 * CHAIN_CYCLES + 1, 4), "unrolled"
    assert sass(WAIT).chain() == (0, 0)


def test_loops_are_branches_back() -> None:
    inner = [".L_x_2:\n", X, line("@P0 BRA `(.L_x_2)")]
    found = sass(".L_x_1:\n", WEIGHT, *inner, USES_X, line("@!P0 BRA `(.L_x_1)"), line("BRA `(.L_x_3)"), ".L_x_3:\n")
    assert found.loops() == [(1, 2), (0, 4)]
