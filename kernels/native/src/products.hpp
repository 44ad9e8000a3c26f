// Products of weight rows and inputs. Included by kernels.hpp.
//
// The inputs of all tokens are normalized and widened to float32 once per thread. A chunk is a range of weight rows, read
// once for all tokens. A tile of weight rows and tokens keeps its sums in registers, one vector per pair, so that a result
// does not depend on the tile that it is computed in. For few tokens, whose time is that of reading the weights, a tile
// has one row, and the weights are read in one stream. For more, whose time is that of the sums, it has several, and so for
// weights of 8 bits: one row would wait for its additions. A scale per row multiplies the finished sums.

// TOKENS · ROWS sums, ROWS weights and an input fit the registers: 32 with AVX-512 and NEON, else 16.
constexpr bool HAS_32_REGISTERS = LANES == 16 || !IS_X86;
constexpr int TOKENS = HAS_32_REGISTERS ? 6 : 4;
constexpr int ROWS = HAS_32_REGISTERS ? 4 : 3;
constexpr int STREAM_TOKENS = 4;
constexpr int64_t STREAM_INPUT_BYTES = 32 * 1024;  // which stay in the first cache
constexpr int64_t LINE_BYTES = 64;         // of a cache
constexpr int64_t PREFETCH_BYTES = 4096;   // ahead in a stream; of dense weights in tiles, the next tile is prefetched
constexpr int64_t QUANTIZED_PREFETCH_BYTES = 8192;  // at least, ahead in tiles of fewer bits, whose bytes are read faster
constexpr int ONCE = 0, REPEATEDLY = 3;    // how often a prefetched weight is read: the locality of __builtin_prefetch
constexpr int64_t BLOCK_BYTES = 256 * 1024;  // of the inputs of a block of tokens
constexpr int64_t MIN_BLOCK_TOKENS = 4 * TOKENS;

// Whole tiles of fewer bits: another distance would prefetch a tile's rows at different times, some too late.
INLINE int64_t prefetch_distance(int64_t tile_bytes) {
  return ceil_div(QUANTIZED_PREFETCH_BYTES, tile_bytes) * tile_bytes;
}

#include "groups.hpp"

// sums[n][r] += w[r][i] · x[n][i], lane by lane, of the columns in a vector.
template <class T, int R, int N>
INLINE void add_columns(const T* w, int64_t width, const float* x, int64_t stride_x, V* sums) {
  V rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) rows[r] = load(w + r * width);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    const V v = load(x + n * stride_x);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[n * R + r] = multiply_add(rows[r], v, sums[n * R + r]);
  }
}

// out[n][r] = Σ w[r][i] · x[n][i] for R weight rows and N tokens.
template <class T, int R, int N, bool IS_STREAM = false>
INLINE void tile(const T* w, int64_t width, const float* x, int64_t stride_x, float* out, int64_t stride_out) {
  // Columns whose prefetch is one instruction per row: with one token, which memory bounds, a line of the caches.
  constexpr int64_t STEP = N == 1 && LINE_BYTES / int64_t(sizeof(T)) > LANES ? LINE_BYTES / sizeof(T) : LANES;
  V sums[N * R] = {};
  const int64_t ahead = sizeof(T) == 1 ? prefetch_distance(R * width) : R * width;
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + STEP <= width; i += STEP) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      if (IS_STREAM) __builtin_prefetch(reinterpret_cast<const char*>(w + r * width + i) + PREFETCH_BYTES, 0, ONCE);
      else __builtin_prefetch(w + r * width + i + ahead, 0, N < TOKENS ? ONCE : REPEATEDLY);
    }
#pragma GCC unroll 16
    for (int64_t j = 0; j < STEP; j += LANES) add_columns<T, R, N>(w + i + j, width, x + i + j, stride_x, sums);
  }
  for (; i + LANES <= width; i += LANES) add_columns<T, R, N>(w + i, width, x + i, stride_x, sums);
  if (i < width) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const V row = load_part(w + r * width + i, width - i);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        const V v = load(x + n * stride_x + i);
        sums[n * R + r] = multiply_add(row, v, sums[n * R + r]);
      }
    }
  }
  float results[N * R];
  sum_all<N * R>(sums, results);
  for (int n = 0; n < N; n++) __builtin_memcpy(out + n * stride_out, results + n * R, R * sizeof(float));
}

template <class T, int R>
INLINE void tiles(const T* w, int64_t width, const float* x, int64_t stride_x, int64_t n_tokens, float* out,
                  int64_t stride_out) {
  int64_t n = 0;
  for (; n + TOKENS <= n_tokens; n += TOKENS)
    tile<T, R, TOKENS>(w, width, x + n * stride_x, stride_x, out + n * stride_out, stride_out);
  x += n * stride_x, out += n * stride_out;
  switch (n_tokens - n) {
    case 1: tile<T, R, 1>(w, width, x, stride_x, out, stride_out); break;
    case 2: tile<T, R, 2>(w, width, x, stride_x, out, stride_out); break;
    case 3: tile<T, R, 3>(w, width, x, stride_x, out, stride_out); break;
    case 4: tile<T, R, 4>(w, width, x, stride_x, out, stride_out); break;
    case 5: tile<T, R, 5>(w, width, x, stride_x, out, stride_out); break;
  }
}

// out[n][r] for `count` weight rows from w on and n_tokens tokens, at most N.
template <class T, int N>
static void stream(const T* w, int64_t count, int64_t width, const float* x, int64_t stride_x, int64_t n_tokens,
                   float* out, int64_t stride_out) {
  if constexpr (N > 1)
    if (n_tokens < N) return stream<T, N - 1>(w, count, width, x, stride_x, n_tokens, out, stride_out);
  for (int64_t r = 0; r < count; r++) tile<T, 1, N, true>(w + r * width, width, x, stride_x, out + r, stride_out);
}

// out[n][r] for `count` weight rows from `row` on.
template <class T>
static void row_products(const Op& op, int64_t row, int64_t count, const float* x, int64_t n_tokens, float* out,
                         int64_t stride_out) {
  const T* w = static_cast<const T*>(op.weight) + row * op.width;
  const int64_t stride_x = input_stride(op);
  const bool is_stream = n_tokens == 1 || (n_tokens <= STREAM_TOKENS && n_tokens * op.width * 4 <= STREAM_INPUT_BYTES);
  if constexpr (sizeof(T) > 1)
    if (is_stream) return stream<T, STREAM_TOKENS>(w, count, op.width, x, stride_x, n_tokens, out, stride_out);
  int64_t r = 0;
  for (; r + ROWS <= count; r += ROWS)
    tiles<T, ROWS>(w + r * op.width, op.width, x, stride_x, n_tokens, out + r, stride_out);
  for (; r < count; r++) tiles<T, 1>(w + r * op.width, op.width, x, stride_x, n_tokens, out + r, stride_out);
}

template <class T>
static void products_of(const Op& op, int64_t row, int64_t count, const float* x, int64_t n_tokens, float* out,
                        int64_t stride_out, float* memory) {
  switch (has_row_scales(op) ? DENSE : op.format) {
    case INT8: return group_products<Bytes<int8>>(op, row, count, x, n_tokens, out, stride_out, memory);
    case FP8: return group_products<Bytes<float8>>(op, row, count, x, n_tokens, out, stride_out, memory);
    case INT4: return group_products<Nibbles>(op, row, count, x, n_tokens, out, stride_out, memory);
  }
  switch (op.format) {
    case INT8: return row_products<int8>(op, row, count, x, n_tokens, out, stride_out);
    case FP8: return row_products<float8>(op, row, count, x, n_tokens, out, stride_out);
    default: return row_products<T>(op, row, count, x, n_tokens, out, stride_out);
  }
}

// Multiplies the sums of all tokens by a scale per weight row, from row `begin` on.
static void scale_rows(const Op& op, int64_t begin, int64_t count, float* sums, int64_t stride) {
  const V unit = splat(op.format == FP8 ? UNIT<float8> : UNIT<int8>);
  for (int64_t i = 0; i < count; i += LANES) {
    const V scale = load_scales(op, op.scales, begin + i, count - i) * unit;
    for (int64_t n = 0; n < op.n_tokens; n++) store(sums + n * stride + i, load(sums + n * stride + i) * scale);
  }
}

// For all tokens, in blocks whose inputs stay in a core's cache while they meet all rows.
template <class T>
static void products(const Op& op, int64_t row, int64_t count, const float* x, float* out, int64_t stride_out,
                     float* memory) {
  const int64_t stride_x = input_stride(op);
  const int64_t fitting = BLOCK_BYTES / (4 * stride_x) / TOKENS * TOKENS;
  const int64_t block = fitting < MIN_BLOCK_TOKENS ? MIN_BLOCK_TOKENS : fitting;
  for (int64_t n = 0; n < op.n_tokens; n += block) {
    const int64_t n_tokens = n + block < op.n_tokens ? block : op.n_tokens - n;
    products_of<T>(op, row, count, x + n * stride_x, n_tokens, out + n * stride_out, stride_out, memory);
  }
  if (has_row_scales(op)) scale_rows(op, row, count, out, stride_out);
}
