// The inputs of a projection: normalized, widened to float32, once per thread. Included by kernels.hpp.

constexpr int64_t INT4_BLOCK = NIBBLES * LANES;  // columns of a vector of 4-bit numbers

INLINE int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// Of a token's inputs, which are zero beyond the width.
INLINE int64_t input_width(const Op& op) {
  return op.format == INT4 ? (op.width + INT4_BLOCK - 1) / INT4_BLOCK * INT4_BLOCK : padded(op.width);
}

// A token's inputs are followed by their sums over groups of columns, where the weight has offsets. A multiple of 4,096
// bytes would map the same column of all tokens to the same few lines of a cache.
INLINE int64_t input_stride(const Op& op) {
  return input_width(op) + (op.offsets == nullptr ? 0 : padded(op.n_scales)) + 16;
}

template <class T> INLINE void widen_row(const T* x, float* out, int64_t width) {
  for (int64_t i = 0; i < width; i += LANES) store(out + i, load_up_to(x + i, width - i));
}

// x / sqrt(mean(x²) + eps), rounded, times the norm's weight, rounded -> float32.
template <class T> INLINE void normalized_row(const T* x, const T* norm, float eps, float* out, int64_t width) {
  V squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const V v = load_up_to(x + i, width - i);
    squares += v * v;
    store(out + i, v);
  }
  const V scale = splat(1.0f / __builtin_sqrtf(sum(squares) / width + eps));
  for (int64_t i = 0; i < width; i += LANES)
    store(out + i, rounded<T>(rounded<T>(load(out + i) * scale) * load_up_to(norm + i, width - i)));
}

// The sum of each group of columns, zero beyond the last.
static void group_sums(const Op& op, const float* x, float* sums) {
  const int64_t size = op.width / op.n_scales;
  for (int64_t group = 0; group < padded(op.n_scales); group++) {
    V total = {};
    for (int64_t i = 0; group < op.n_scales && i < size; i += LANES) total += load(x + group * size + i);
    sums[group] = sum(total);
  }
}

// Lane j of a vector of 4-bit numbers has columns 8j to 8j + 7. Their inputs are put into that order: vector k of a block
// has column 8j + k in lane j.
static void reorder_for_int4(const Op& op, float* x) {
  for (int64_t i = 0; i < op.width; i += INT4_BLOCK) {
    float block[INT4_BLOCK];
    for (int64_t column = 0; column < INT4_BLOCK; column++) block[column] = i + column < op.width ? x[i + column] : 0;
    for (int k = 0; k < NIBBLES; k++)
      for (int j = 0; j < LANES; j++) x[i + k * LANES + j] = block[NIBBLES * j + k];
  }
}

// The inputs of all tokens, (N, stride) float32.
template <class T> static void prepare_inputs(const Op& op, Scratch& scratch) {
  const int64_t stride = input_stride(op);
  float* inputs = scratch.inputs(op.n_tokens * stride);
  for (int64_t n = 0; n < op.n_tokens; n++) {
    const T* x = static_cast<const T*>(op.x) + n * op.width;
    float* out = inputs + n * stride;
    if (op.norm != nullptr) normalized_row(x, static_cast<const T*>(op.norm), op.eps, out, op.width);
    else widen_row(x, out, op.width);
    if (op.offsets != nullptr) group_sums(op, out, out + input_width(op));
    if (op.format == INT4) reorder_for_int4(op, out);
  }
}
