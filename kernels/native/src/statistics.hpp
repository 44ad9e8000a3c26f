// Sampling's passes over the logits. Included by kernels.hpp.

constexpr int DOUBLES = LANES / 2;  // in a vector
typedef double VD __attribute__((vector_size(8 * DOUBLES)));
typedef int64_t VL __attribute__((vector_size(8 * DOUBLES)));
typedef float VF __attribute__((vector_size(4 * DOUBLES)));  // as many floats

// Of a block of a row: its largest logit, the lowest id with it, Σ exp(x - largest), and whether there is a NaN.
template <class T> static void statistics_chunk(const Op& op, int64_t chunk) {
  const int64_t blocks = op.groups, row = chunk / blocks, block = chunk % blocks;
  const int64_t begin = block * op.split;
  const int64_t end = begin + op.split < op.vocab ? begin + op.split : op.vocab;
  const T* x = static_cast<const T*>(op.x) + row * op.vocab;
  const float lowest = -__builtin_inff();
  V largest = splat(lowest);
  bool has_nan = false;
  VI nans = {};
  for (int64_t i = begin; i < end; i += LANES) {
    V v = load_up_to(x + i, end - i);
    nans |= v != v;
    if (end - i < LANES)
      for (int64_t lane = end - i; lane < LANES; lane++) v[lane] = lowest;
    largest = larger(v, largest);
  }
  for (int lane = 0; lane < LANES; lane++) has_nan |= nans[lane] != 0;
  const float max = max_of(largest);
  int64_t first = begin;
  while (first + 1 < end && !(get(x + first) == max)) first++;
  V sums = {};
  double total = 0;
  if (max > lowest) {
    for (int64_t i = begin; i < end; i += LANES) {
      V e = exponential(load_up_to(x + i, end - i) - splat(max));
      if (end - i < LANES)
        for (int64_t lane = end - i; lane < LANES; lane++) e[lane] = 0;
      sums += e;
    }
    total = sum(sums);
  }
  float* result = op.partial + (row * blocks + block) * 4;
  result[0] = max, result[1] = bits_of<float>(int32_t(first)), result[2] = float(total), result[3] = has_nan;
}

// e^x in float64, as `exponential` in float32.
INLINE VD exponential(VD x) {
  const VD clamped = x < -708.0 ? VD{} - 708.0 : x;
  const VD magic = VD{} + 6755399441055744.0;  // 1.5 · 2^52
  const VD shifted = clamped * 1.4426950408889634 + magic;
  const VD n = shifted - magic;
  const VD r = clamped - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  VD e = VD{} + 1.0 / 6227020800.0;
  constexpr double INVERSE_FACTORIALS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                           1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                           1.0 / 2,         1.0,            1.0};
#pragma GCC unroll 16
  for (double coefficient : INVERSE_FACTORIALS) e = e * r + coefficient;
  const VD power = bits_of<VD>((bits_of<VL>(shifted) - bits_of<VL>(magic) + 1023) << 52);
  return x < -708.0 ? VD{} : e * power;
}

template <class T>
static double fill_row(const T* logits, int64_t vocab, float max, double inverse, float* x, double* mass) {
  VD sums = {};
  for (int64_t i = 0; i < vocab; i += DOUBLES) {
    const int64_t count = vocab - i < DOUBLES ? vocab - i : DOUBLES;
    VF values;
    for (int64_t lane = 0; lane < DOUBLES; lane++) values[lane] = lane < count ? get(logits + i + lane) : -__builtin_inff();
    const VD masses = exponential(__builtin_convertvector(values - max, VD) * inverse);
    sums += masses;
    __builtin_memcpy(x + i, &values, count * sizeof(float));
    __builtin_memcpy(mass + i, &masses, count * sizeof(double));
  }
  double total = 0;
  for (int lane = 0; lane < DOUBLES; lane++) total += sums[lane];
  return total;
}

static double fill_masses(const Op& op, int64_t row, float max, double inverse, float* x, double* mass) {
  const int64_t at = row * op.vocab;
  switch (op.dtype) {
    case BFLOAT16: return fill_row(static_cast<const bfloat16*>(op.x) + at, op.vocab, max, inverse, x, mass);
    case FLOAT16: return fill_row(static_cast<const float16*>(op.x) + at, op.vocab, max, inverse, x, mass);
    default: return fill_row(static_cast<const float*>(op.x) + at, op.vocab, max, inverse, x, mass);
  }
}
