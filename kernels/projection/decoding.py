"""Device functions of `quantized_matvec.py`: x in the order of a quantised weight's words, its norm, and products."""

import triton
import triton.language as tl

from fastllama.kernels.projection.conversions import HIGH_UNIT, LOW_UNIT, decoded, low_half, scale_and_offset


@triton.jit
def load_runs(
    ptr,
    IN: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RUNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Load a vector (IN,), x or a norm's weight, as the words of a row need it: a tuple for `run_values`.

    WORDS: words of a row that are used together, CHUNKS times. BLOCK: columns of a block. RUNS: runs of 4 columns in a
    word. WIDE: the vector has 16-bit numbers, and IN is a multiple of 4.
    """
    B: tl.constexpr = BLOCK // (4 * RUNS)
    EVEN: tl.constexpr = IN % (WORDS * RUNS * 4) == 0
    word = tl.arange(0, WORDS)
    loaded = ()
    for i in tl.static_range(CHUNKS):
        for r in tl.static_range(RUNS):
            run = i * (WORDS * RUNS) + word // B * (B * RUNS) + r * B + word % B
            if WIDE:
                at = ptr.to(tl.pointer_type(tl.int64)) + run
                if EVEN:
                    loaded = loaded + (tl.load(at),)
                else:
                    loaded = loaded + (tl.load(at, mask=run < IN // 4, other=0),)
            else:
                for k in tl.static_range(4):
                    loaded = loaded + (tl.load(ptr + 4 * run + k, mask=4 * run + k < IN, other=0.0),)
    return loaded


@triton.jit
def run_values(loaded, i: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr):
    """The 4 · RUNS numbers of each word of the i-th WORDS words, in float32, in the order of `decoded`."""
    values = ()
    for r in tl.static_range(RUNS):
        if WIDE:
            pair, pair_2 = loaded[i * RUNS + r].to(tl.int32), (loaded[i * RUNS + r] >> 32).to(tl.int32)
            values = values + _pair_values(pair, dtype) + _pair_values(pair_2, dtype)
        else:
            for k in tl.static_range(4):
                values = values + (loaded[(i * RUNS + r) * 4 + k].to(tl.float32),)
    return values


@triton.jit
def _pair_values(pair, dtype: tl.constexpr):
    """The two numbers of 16 bits in a word, in float32."""
    if dtype == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return low_half(pair, dtype).to(tl.float32), low_half(pair >> 16, dtype).to(tl.float32)


@triton.jit
def hidden(loaded, ASM: tl.constexpr):
    """The same words, which the compiler takes for others: it does not compute what it needs of them in two places
    earlier, in a branch and beside it."""
    if ASM:
        words = ()
        for i in tl.static_range(len(loaded)):
            same = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [loaded[i]], tl.int64, is_pure=True, pack=1)
            words = words + (same,)
        return words
    else:
        return loaded


@triton.jit
def inverse_norm(x, eps, IN: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr, RUNS, WIDE, dtype):
    """1 / sqrt(mean(x²) + eps) of a vector, given as `load_runs` returns it."""
    squares = tl.zeros((WORDS,), tl.float32)
    for i in tl.static_range(CHUNKS):
        values = run_values(x, i, RUNS, WIDE, dtype)
        for k in tl.static_range(4 * RUNS):
            squares += values[k] * values[k]
    return tl.rsqrt(tl.sum(squares, 0) / IN + eps)


@triton.jit
def normed(values, scales, inverse, dtype: tl.constexpr, ASM: tl.constexpr):
    """x · inverse, rounded to the dtype, times the norm's weight, rounded: where Meta's code rounds. All in float32."""
    results = ()
    for k in tl.static_range(0, len(values), 2):
        first, second = _rounded(values[k] * inverse, values[k + 1] * inverse, dtype, ASM)
        results = results + _rounded(first * scales[k], second * scales[k + 1], dtype, ASM)
    return results


@triton.jit
def _rounded(first, second, dtype: tl.constexpr, ASM: tl.constexpr):
    """Two numbers in float32, rounded to the dtype: bfloat16 in one instruction."""
    if ASM and dtype == tl.bfloat16:
        text: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        pair = tl.inline_asm_elementwise(text, "=r,f,f", [first, second], tl.int32, is_pure=True, pack=1)
        return _pair_values(pair, dtype)
    else:
        return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def add_products(totals, words, x, scales, FORMAT: tl.constexpr, GROUPS: tl.constexpr, SCALE_DTYPE, HAS_ZEROS, ASM):
    """totals plus a tile of words (BLOCK_ROWS, WORDS) times x, a tuple of tensors (WORDS,).

    GROUPS 0: totals (BLOCK_ROWS, WORDS) without scales. Else totals and scales (BLOCK_ROWS, WORDS / 2).
    """
    weights = decoded(words, FORMAT, ASM)
    if GROUPS == 0:
        totals = _sums(totals, weights, x, 0)
    else:
        sums = _pair_sums(_sums(tl.zeros(words.shape, tl.float32), weights, x, 0))
        if FORMAT == "int4":
            high = _pair_sums(_sums(tl.zeros(words.shape, tl.float32), weights, x, 8))
            sums = sums * LOW_UNIT + high * HIGH_UNIT if ASM else sums + high
            sum_x = x[0]
            for k in tl.static_range(1, 16):
                sum_x += x[k]
            scale, offset = scale_and_offset(scales, SCALE_DTYPE, HAS_ZEROS)
            totals += scale * sums + offset * _pair_sums(sum_x[None, :])
        else:
            totals += scales.to(tl.float32) * sums
    return totals


@triton.jit
def _sums(totals, weights, x, begin: tl.constexpr):
    """totals plus eight weights of each word times x."""
    for k in tl.static_range(begin, begin + 8):
        totals += weights[k] * x[k][None, :]
    return totals


@triton.jit
def _pair_sums(values):
    """(ROWS, WORDS) -> (ROWS, WORDS / 2): sums over the two words that a thread holds."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)), 2)
