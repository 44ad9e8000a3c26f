// Vectors of LANES floats, for one instruction set. Included by kernels.hpp inside a namespace of that instruction set.
//
// Only builtins and intrinsics: a function of the standard library that is compiled here could replace, at link time, the
// one that a lesser processor runs.

#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VH __attribute__((vector_size(2 * LANES)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE V splat(float x) { return x - V{}; }

template <class To, class From> INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

INLINE V larger(V a, V b) { return a > b ? a : b; }

// a · b + c, with one rounding where the instruction set has it. A compiler that may choose would round some results of a
// product once and others twice.
#if LANES == 16
INLINE V multiply_add(V a, V b, V c) {
  return bits_of<V>(_mm512_fmadd_ps(bits_of<__m512>(a), bits_of<__m512>(b), bits_of<__m512>(c)));
}
#elif LANES == 8
INLINE V multiply_add(V a, V b, V c) {
  return bits_of<V>(_mm256_fmadd_ps(bits_of<__m256>(a), bits_of<__m256>(b), bits_of<__m256>(c)));
}
#elif defined(__aarch64__)
INLINE V multiply_add(V a, V b, V c) {
  return bits_of<V>(vfmaq_f32(bits_of<float32x4_t>(c), bits_of<float32x4_t>(a), bits_of<float32x4_t>(b)));
}
#else
INLINE V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

// 16 bits to 32 as integers; float16 to float32, exactly; and back, rounding to the nearest, ties to even.
#if LANES == 16
INLINE VU zero_extend(VH h) { return bits_of<VU>(_mm512_cvtepu16_epi32(bits_of<__m256i>(h))); }
INLINE V widen(VH h) { return bits_of<V>(_mm512_cvtph_ps(bits_of<__m256i>(h))); }
INLINE VH narrow(V v) { return bits_of<VH>(_mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif LANES == 8
INLINE VU zero_extend(VH h) { return bits_of<VU>(_mm256_cvtepu16_epi32(bits_of<__m128i>(h))); }
INLINE V widen(VH h) { return bits_of<V>(_mm256_cvtph_ps(bits_of<__m128i>(h))); }
INLINE VH narrow(V v) { return bits_of<VH>(_mm256_cvtps_ph(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__)
INLINE VU zero_extend(VH h) { return __builtin_convertvector(h, VU); }
INLINE V widen(VH h) { return bits_of<V>(vcvt_f32_f16(bits_of<float16x4_t>(h))); }
INLINE VH narrow(V v) { return bits_of<VH>(vcvt_f16_f32(bits_of<float32x4_t>(v))); }
#else
INLINE VU zero_extend(VH h) { return __builtin_convertvector(h, VU); }
INLINE V widen(VH h) {
  const VU wide = zero_extend(h);
  const V scaled = bits_of<V>((wide & 0x7fffu) << 13) * splat(0x1p112f);  // also right for subnormal numbers
  const VU exponent = scaled >= splat(65536.0f) ? (VU{} + 0x7f800000u) : VU{};  // infinity and NaN
  return bits_of<V>(bits_of<VU>(scaled) | exponent | (wide & 0x8000u) << 16);
}
INLINE VH narrow(V v) {
  const VU bits = bits_of<VU>(v), sign = bits >> 16 & 0x8000u;
  const V size = bits_of<V>(bits & 0x7fffffffu);
  // The unit of 0.5f's last bit is the smallest float16: adding 0.5 rounds a subnormal result.
  const VU small = bits_of<VU>(size + splat(0.5f)) - 0x3f000000u;
  const VU magnitude = bits_of<VU>(size);
  const VU normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  VU half = size < splat(0x1p-14f) ? small : normal;
  half = size >= splat(65520.0f) ? (VU{} + 0x7c00u) : half;
  half = size != size ? (VU{} + 0x7e00u) : half;
  return __builtin_convertvector(half | sign, VH);
}
#endif

INLINE V load(const float* p) { V v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE V load(const float16* p) { VH h; __builtin_memcpy(&h, p, sizeof h); return widen(h); }
INLINE V load(const bfloat16* p) {
  VH h;
  __builtin_memcpy(&h, p, sizeof h);
  return bits_of<V>(zero_extend(h) << 16);
}

INLINE VH to_bfloat16(V v) {
  const VU bits = bits_of<VU>(v);
  const VU rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return __builtin_convertvector((v != v ? (VU{} + 0x7fc00000u) : rounded) >> 16, VH);
}

INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(float16* p, V v) { const VH h = narrow(v); __builtin_memcpy(p, &h, sizeof h); }
INLINE void store(bfloat16* p, V v) { const VH h = to_bfloat16(v); __builtin_memcpy(p, &h, sizeof h); }

// The first `count` < LANES values; the others are 0.
template <class T> INLINE V load_part(const T* p, int64_t count) {
  T part[LANES] = {};
  for (int64_t i = 0; i < count; i++) part[i] = p[i];
  return load(part);
}
template <class T> INLINE void store_part(T* p, V v, int64_t count) {
  T part[LANES];
  store(part, v);
  for (int64_t i = 0; i < count; i++) p[i] = part[i];
}
template <class T> INLINE V load_up_to(const T* p, int64_t count) {
  return count >= LANES ? load(p) : load_part(p, count);
}
template <class T> INLINE void store_up_to(T* p, V v, int64_t count) {
  if (count >= LANES) store(p, v); else store_part(p, v, count);
}

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

// Rounds to the model dtype.
template <class T> INLINE V rounded(V v) {
  if constexpr (same<T, float>) return v;
  else if constexpr (same<T, float16>) return widen(narrow(v));
  else return bits_of<V>(zero_extend(to_bfloat16(v)) << 16);
}

// One value.
template <class T> INLINE float get(const T* p) {
  if constexpr (same<T, float>) return *p;
  else if constexpr (same<T, bfloat16>) return bits_of<float>(uint32_t(p->bits) << 16);
  else return widen(VH{p->bits})[0];
}
template <class T> INLINE float rounded_value(float x) {
  if constexpr (same<T, float>) return x;
  else return rounded<T>(splat(x))[0];
}
template <class T> INLINE void put(T* p, float x) {
  if constexpr (same<T, float>) *p = x;
  else store_part(p, splat(x), 1);
}

INLINE float sum(V v) {
#if LANES == 16
  return _mm512_reduce_add_ps(bits_of<__m512>(v));
#else
  float total = 0;
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  total = v[0];
  return total;
#endif
}

#if LANES == 16
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif

// Sums of adjacent lanes: a's, then b's.
INLINE V pair_sums(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, EVEN_LANES) + __builtin_shufflevector(a, b, ODD_LANES);
#else
  return __builtin_shuffle(a, b, VI{EVEN_LANES}) + __builtin_shuffle(a, b, VI{ODD_LANES});
#endif
}

// Lane i of the result is the sum of v[i], for COUNT vectors, a power of two. The order of the sum does not depend on
// COUNT. Changes v.
template <int COUNT> INLINE V sum_each(V* v) {
#pragma GCC unroll 4
  for (int count = COUNT; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; i++) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int lanes = LANES / COUNT; lanes > 1; lanes /= 2) v[0] = pair_sums(v[0], v[0]);
  return v[0];
}

// out[i] is the sum of v[i], for any number of vectors. Changes v.
template <int COUNT> INLINE void sum_all(V* v, float* out) {
  constexpr int MOST = COUNT < LANES ? COUNT : LANES;
  constexpr int PART = MOST >= 16 ? 16 : MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;
  const V sums = sum_each<PART>(v);
  __builtin_memcpy(out, &sums, PART * sizeof(float));
  if constexpr (COUNT > PART) sum_all<COUNT - PART>(v + PART, out + PART);
}

INLINE float max_of(V v) {
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
  return v[0];
}

// e^x to about one ulp; results below the normal numbers are 0. x = n·ln 2 + r, e^x = 2^n · e^r, with e^r by its series.
INLINE V exponential(V x) {
  const V clamped = x < splat(-87.3f) ? splat(-87.3f) : x > splat(88.7f) ? splat(88.7f) : x;
  const V magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const V shifted = clamped * splat(1.44269504f) + magic;
  const V n = shifted - magic;
  const V r = clamped - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  V e = splat(1.0f / 5040);
  e = e * r + splat(1.0f / 720);
  e = e * r + splat(1.0f / 120);
  e = e * r + splat(1.0f / 24);
  e = e * r + splat(1.0f / 6);
  e = e * r + splat(0.5f);
  e = e * r + splat(1.0f);
  e = e * r + splat(1.0f);
  const V power = bits_of<V>((bits_of<VI>(shifted) - bits_of<VI>(magic) + 127) << 23);
  const V result = x < splat(-87.3f) ? V{} : e * power;
  return x != x ? x : result;
}
