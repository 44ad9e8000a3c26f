"""Device functions that convert quantised weights to numbers, in the order of `packing.py`.

Every weight becomes exactly its q, so sums with x are as those of unquantised weights, without other rounding.
Instructions for a weight on NVIDIA GPUs, before the multiply-add:

    int8    1.5      two of a word's four bytes by a conversion of bytes, of which a multiprocessor begins 16 a clock,
                     two by a byte permutation and a conversion of integers, which other units do
    fp8     1.5      two e4m3 at once to float16, and each to float32
    int4    1.625    `and` leaves two nibbles in the low bits of two float16, which are subnormal: q · 2^-24, or
                     q · 2^-20 of high nibbles; then each to float32

Matrix instructions take x's dtype: int8 by triton's own conversion, fp8 by way of float32, and int4 below a high byte
that makes it 128 + q, from which 128 is subtracted; 1.4 to 2 instructions.

With ASM false it is done by integer operations of triton, on any GPU and in the interpreter: 1 to 4 instructions more.
"""

import triton
import triton.language as tl

INT8_ASM = tl.constexpr("""{
    .reg .b32 t;
    prmt.b32 t, $2, 0, 0x9991;
    cvt.rn.f32.s32 $0, t;
    prmt.b32 t, $2, 0, 0xBBB3;
    cvt.rn.f32.s32 $1, t;
}""")
FP8_ASM = tl.constexpr("""{
    .reg .b16 a, b, c, d;
    .reg .b32 u, v;
    mov.b32 {a, b}, $4;
    cvt.rn.f16x2.e4m3x2 u, a;
    cvt.rn.f16x2.e4m3x2 v, b;
    mov.b32 {a, b}, u;
    mov.b32 {c, d}, v;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")
INT4_ASM = tl.constexpr("""{
    .reg .b16 a, b;
    .reg .b32 h, t;
    shr.u32 h, $8, 8;
    and.b32 t, $8, 0x000F000F;
    mov.b32 {a, b}, t;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $2, b;
    and.b32 t, h, 0x000F000F;
    mov.b32 {a, b}, t;
    cvt.f32.f16 $1, a;
    cvt.f32.f16 $3, b;
    and.b32 t, $8, 0x00F000F0;
    mov.b32 {a, b}, t;
    cvt.f32.f16 $4, a;
    cvt.f32.f16 $6, b;
    and.b32 t, h, 0x00F000F0;
    mov.b32 {a, b}, t;
    cvt.f32.f16 $5, a;
    cvt.f32.f16 $7, b;
}""")
# Two numbers of 16 bits in a register: nibbles below a high byte are 128 + q in bfloat16, 1024 + q in float16.
_INT4_AS_16_BITS = """{
    .reg .b32 a, b, c, d, e, f;
    mov.b32 e, 0xONE;
    mov.b32 f, 0xMINUS;
    and.b32 c, $4, 0x0F0F0F0F;
    shr.u32 d, $4, 4;
    and.b32 d, d, 0x0F0F0F0F;
    prmt.b32 a, c, 0xHIGH, 0x4140;
    prmt.b32 b, c, 0xHIGH, 0x4342;
    prmt.b32 c, d, 0xHIGH, 0x4140;
    prmt.b32 d, d, 0xHIGH, 0x4342;
    fma.rn.TYPE $0, a, e, f;
    fma.rn.TYPE $1, b, e, f;
    fma.rn.TYPE $2, c, e, f;
    fma.rn.TYPE $3, d, e, f;
}"""


def _int4_as_16_bits(**values: str) -> tl.constexpr:
    """The assembly for one type: ONE and MINUS are 1 and the negative of what HIGH adds, twice."""
    text = _INT4_AS_16_BITS
    for name, value in values.items():
        text = text.replace(name, value)
    return tl.constexpr(text)


INT4_AS_BF16 = _int4_as_16_bits(ONE="3F803F80", MINUS="C300C300", HIGH="43434343", TYPE="bf16x2")
INT4_AS_FP16 = _int4_as_16_bits(ONE="3C003C00", MINUS="E400E400", HIGH="64646464", TYPE="f16x2")
_ONES = "mov.b32 $0, 0x{0}; mov.b32 $1, 0x{0};"
FP8_AS_BF16 = tl.constexpr("""{
    .reg .b16 a, b, c, d;
    .reg .b32 u, v;
    .reg .f32 e, f, g, h;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 u, a;
    cvt.rn.f16x2.e4m3x2 v, b;
    mov.b32 {a, b}, u;
    mov.b32 {c, d}, v;
    cvt.f32.f16 e, a;
    cvt.f32.f16 f, b;
    cvt.f32.f16 g, c;
    cvt.f32.f16 h, d;
    cvt.rn.bf16x2.f32 $0, f, e;
    cvt.rn.bf16x2.f32 $1, h, g;
}""")
FP8_AS_FP16 = tl.constexpr("""{
    .reg .b16 a, b;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
}""")
ONES_BF16, ONES_FP16 = tl.constexpr(_ONES.format("3F803F80")), tl.constexpr(_ONES.format("3C003C00"))
# What a low and a high nibble of INT4_ASM must be multiplied by.
LOW_UNIT, HIGH_UNIT = tl.constexpr(2.0**24), tl.constexpr(2.0**20)
FP8_BITS = tl.constexpr(-0x78100000)  # 0x87F00000: sign, exponent and mantissa of e4m3 where float32 has them
FP8_UNIT = tl.constexpr(2.0**120)  # between the exponents' biases
FP8_BITS_16, FP8_UNIT_16 = tl.constexpr(-0x4080), tl.constexpr(2.0**8)  # 0xBF80: the same of float16


@triton.jit
def decoded(words, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """int64 words -> tuple of 8 float32 tensors, of int4 16: the weights of a word in the order of its bytes, of int4
    first those of the low halves. int4's are in units of 1 / LOW_UNIT and 1 / HIGH_UNIT with ASM."""
    first = _decoded(words.to(tl.int32), FORMAT, ASM)
    second = _decoded((words >> 32).to(tl.int32), FORMAT, ASM)
    if FORMAT == "int4":
        return first[:4] + second[:4] + first[4:] + second[4:]
    else:
        return first + second


@triton.jit
def _decoded(words, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """int32 words -> tuple of 4 float32 tensors, of int4 8: low halves of the bytes, then high halves."""
    four: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
    if not ASM:
        return _decoded_plainly(words, FORMAT)
    elif FORMAT == "int8":
        two: tl.constexpr = (tl.float32, tl.float32)
        odd = tl.inline_asm_elementwise(INT8_ASM, "=&f,=&f,r", [words], dtype=two, is_pure=True, pack=1)
        return ((words << 24) >> 24).to(tl.float32), odd[0], ((words << 8) >> 24).to(tl.float32), odd[1]
    elif FORMAT == "fp8":
        return tl.inline_asm_elementwise(FP8_ASM, "=&f,=&f,=&f,=&f,r", [words], dtype=four, is_pure=True, pack=1)
    else:
        results: tl.constexpr = "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r"
        return tl.inline_asm_elementwise(INT4_ASM, results, [words], dtype=four + four, is_pure=True, pack=1)


@triton.jit
def _decoded_plainly(words, FORMAT: tl.constexpr):
    """`_decoded` without assembly; NaN of fp8 becomes 480."""
    values = ()
    for byte in tl.static_range(4):
        if FORMAT == "int8":
            values = values + (((words << (24 - 8 * byte)) >> 24).to(tl.float32),)
        elif FORMAT == "fp8":
            bits = ((words << (24 - 8 * byte)) >> 4) & FP8_BITS
            values = values + (bits.to(tl.float32, bitcast=True) * FP8_UNIT,)
        else:
            values = values + (((words >> (8 * byte)) & 15).to(tl.float32),)
    if FORMAT == "int4":
        for byte in tl.static_range(4):
            values = values + (((words >> (8 * byte + 4)) & 15).to(tl.float32),)
    return values


@triton.jit
def bytes_as(values, dtype: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """int8, or the bits of e4m3 in uint8, in x's dtype."""
    if FORMAT == "int8":
        return values.to(dtype)
    elif ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(FP8_AS_BF16, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(FP8_AS_FP16, "=&r,=r,r", [values], dtype=tl.float16, is_pure=True, pack=4)
    else:
        bits = (values.to(tl.int8, bitcast=True).to(tl.int16) << 7) & FP8_BITS_16
        return (bits.to(tl.float16, bitcast=True) * FP8_UNIT_16).to(dtype)


@triton.jit
def nibbles_as(values, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes -> their low halves and their high halves, in x's dtype."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            INT4_AS_BF16, "=&r,=&r,=&r,=&r,r", [values], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            INT4_AS_FP16, "=&r,=&r,=&r,=&r,r", [values], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return (values & 15).to(dtype), (values >> 4).to(dtype)


@triton.jit
def ones_like(values, dtype: tl.constexpr, ASM: tl.constexpr):
    """Ones in x's dtype, one for each byte. As they come from the bytes, the compiler puts them, and the x that they
    are multiplied by, in the same order as `nibbles_as`: x is read from shared memory once."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(ONES_BF16, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(ONES_FP16, "=r,=r,r", [values], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return tl.full(values.shape, 1.0, dtype)


@triton.jit
def scale_and_offset(pairs, SCALE_DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """int4's scales, and what is added for each weight: the minima, or minus scale times zero; in float32."""
    scale, offset = low_half(pairs, SCALE_DTYPE).to(tl.float32), low_half(pairs >> 16, SCALE_DTYPE).to(tl.float32)
    if HAS_ZEROS:
        offset = -scale * offset
    return scale, offset


@triton.jit
def low_half(pair, dtype: tl.constexpr):
    """The number of 16 bits in the low half of a word."""
    return pair.to(tl.int16).to(dtype, bitcast=True)
