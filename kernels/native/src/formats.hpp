// Weights in fewer bits, as kernels/quantized.py describes them: to float32 in registers. Included by kernels.hpp.

constexpr int64_t MIN_GROUP = 32;  // columns of the smallest groups

struct int8 { int8_t bits; };
struct float8 { uint8_t bits; };  // e4m3. The two bit patterns of NaN, which no weight has, are read as ±480.

// Bytes to 16 bits, with their sign.
INLINE VH sign_extend(const void* p) {
#if LANES == 16
  return bits_of<VH>(_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif LANES == 8
  return bits_of<VH>(_mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return bits_of<VH>(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)))));
#else
  const int8_t* bytes = static_cast<const int8_t*>(p);
  return VH{uint16_t(bytes[0]), uint16_t(bytes[1]), uint16_t(bytes[2]), uint16_t(bytes[3])};
#endif
}

INLINE V load(const int8* p) {
#if LANES == 16
  return bits_of<V>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif LANES == 8
  return bits_of<V>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  return __builtin_convertvector(bits_of<VI>(zero_extend(sign_extend(p)) << 16) >> 16, V);
#endif
}

// The value / 256: its bits are those of a float16 with a longer exponent, which also has the subnormal values.
INLINE V load(const float8* p) { return widen(sign_extend(p) << 7 & uint16_t(0xbfff)); }

// What `load` leaves out, which is part of a scale.
template <class Q> constexpr float UNIT = same<Q, float8> ? 256.0f : 1.0f;

// Number `index` of the eight 4-bit numbers in each lane.
constexpr int NIBBLES = 8;
INLINE V nibbles(VU words, int index) {
  const VU shifted = words >> 4 * index;
#if LANES == 16
  const V table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // looked up by the lowest four bits
  return bits_of<V>(_mm512_permutexvar_ps(bits_of<__m512i>(shifted), bits_of<__m512>(table)));
#else
  return __builtin_convertvector(bits_of<VI>(shifted & 15u), V);
#endif
}

// Lane i of the result is v[index[i]].
INLINE V permuted(V v, VI index) {
#if LANES == 16
  return bits_of<V>(_mm512_permutexvar_ps(bits_of<__m512i>(index), bits_of<__m512>(v)));
#elif LANES == 8
  return bits_of<V>(_mm256_permutevar8x32_ps(bits_of<__m256>(v), bits_of<__m256i>(index)));
#else
  V result;
  for (int i = 0; i < LANES; i++) result[i] = v[index[i]];
  return result;
#endif
}

// Up to LANES scales or offsets, from number `at` on.
INLINE V load_scales(const Op& op, const void* from, int64_t at, int64_t count) {
  switch (op.scale_dtype) {
    case BFLOAT16: return load_up_to(static_cast<const bfloat16*>(from) + at, count);
    case FLOAT16: return load_up_to(static_cast<const float16*>(from) + at, count);
    default: return load_up_to(static_cast<const float*>(from) + at, count);
  }
}

// A scale per row, which multiplies finished sums; else each block of columns has its own.
INLINE bool has_row_scales(const Op& op) { return op.n_scales == 1 && (op.format == INT8 || op.format == FP8); }

// The scales and offsets of `count` weight rows from `row` on, in float32: w = scale · q + offset. LANES zeros follow.
INLINE void widen_scales(const Op& op, float unit, int64_t row, int64_t count, float* scales, float* offsets) {
  const int64_t begin = row * op.n_scales, n = count * op.n_scales;
  for (int64_t i = 0; i < n; i += LANES) {
    const V scale = load_scales(op, op.scales, begin + i, n - i) * splat(unit);
    store(scales + i, scale);
    if (op.offsets == nullptr) continue;
    const V offset = load_scales(op, op.offsets, begin + i, n - i);
    store(offsets + i, op.has_zeros ? -(offset * scale) : offset);
  }
  store(scales + n, V{});
  store(offsets + n, V{});
}

INLINE int64_t scales_of_tile(const Op& op, int rows) { return rows * op.n_scales + 2 * LANES; }  // floats
