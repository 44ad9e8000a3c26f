// y = epilogue(weight · norm(x) + bias): every projection of a layer, and the head. Included by kernels.hpp.
//
// The inputs of all tokens are normalized and widened to float32 once per thread. A chunk is a range of weight rows, read
// once for all tokens. A tile of weight rows and tokens keeps its sums in registers, one vector per pair, so that a result
// does not depend on the tile that it is computed in. For few tokens, whose time is that of reading the weights, a tile
// has one row, and the weights are read in one stream. For more, whose time is that of the sums, it has several.

// TOKENS · ROWS sums, ROWS weights and an input fit the registers: 32 with AVX-512 and NEON, else 16.
constexpr bool HAS_32_REGISTERS = LANES == 16 || !IS_X86;
constexpr int TOKENS = HAS_32_REGISTERS ? 6 : 4;
constexpr int ROWS = HAS_32_REGISTERS ? 4 : 3;
constexpr int STREAM_TOKENS = 4;
constexpr int64_t STREAM_INPUT_BYTES = 32 * 1024;  // which stay in the first cache
constexpr int64_t PREFETCH_BYTES = 4096;   // ahead in a stream; with more tokens, the next tile is prefetched
constexpr int ONCE = 0, REPEATEDLY = 3;    // how often a prefetched weight is read: the locality of __builtin_prefetch
constexpr int64_t BLOCK_BYTES = 256 * 1024;  // of the inputs of a block of tokens
constexpr int64_t MIN_BLOCK_TOKENS = 4 * TOKENS;

INLINE int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// Of the inputs. A multiple of 4,096 bytes would map the same column of all tokens to the same few lines of a cache.
INLINE int64_t input_stride(int64_t width) { return padded(width) + 16; }

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

// The inputs of all tokens, (N, stride) float32, zero beyond the width.
template <class T> static void prepare_inputs(const Op& op, Scratch& scratch) {
  const int64_t stride = input_stride(op.width);
  float* inputs = scratch.inputs(op.n_tokens * stride);
  for (int64_t n = 0; n < op.n_tokens; n++) {
    const T* x = static_cast<const T*>(op.x) + n * op.width;
    if (op.norm != nullptr) normalized_row(x, static_cast<const T*>(op.norm), op.eps, inputs + n * stride, op.width);
    else widen_row(x, inputs + n * stride, op.width);
  }
}

// out[n][r] = Σ w[r][i] · x[n][i] for R weight rows and N tokens.
template <class T, int R, int N, bool IS_STREAM = false>
INLINE void tile(const T* w, int64_t width, const float* x, int64_t stride_x, float* out, int64_t stride_out) {
  V sums[N * R] = {};
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + LANES <= width; i += LANES) {
    V rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      if (IS_STREAM) __builtin_prefetch(reinterpret_cast<const char*>(w + r * width + i) + PREFETCH_BYTES, 0, ONCE);
      else __builtin_prefetch(w + (r + R) * width + i, 0, N < TOKENS ? ONCE : REPEATEDLY);
      rows[r] = load(w + r * width + i);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const V v = load(x + n * stride_x + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[n * R + r] = multiply_add(rows[r], v, sums[n * R + r]);
    }
  }
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

// out[n][r] for `count` weight rows from w on and tokens [begin, end).
template <class T>
static void block_products(const Op& op, const T* w, int64_t count, int64_t begin, int64_t end, const float* x,
                           float* out, int64_t stride_out) {
  const int64_t stride_x = input_stride(op.width), n_tokens = end - begin;
  x += begin * stride_x, out += begin * stride_out;
  if (n_tokens == 1 || (n_tokens <= STREAM_TOKENS && n_tokens * op.width * 4 <= STREAM_INPUT_BYTES))
    return stream<T, STREAM_TOKENS>(w, count, op.width, x, stride_x, n_tokens, out, stride_out);
  int64_t r = 0;
  for (; r + ROWS <= count; r += ROWS)
    tiles<T, ROWS>(w + r * op.width, op.width, x, stride_x, n_tokens, out + r, stride_out);
  for (; r < count; r++) tiles<T, 1>(w + r * op.width, op.width, x, stride_x, n_tokens, out + r, stride_out);
}

// For all tokens, in blocks whose inputs stay in a core's cache while they meet all rows.
template <class T>
static void products(const Op& op, const T* w, int64_t count, const float* x, float* out, int64_t stride_out) {
  const int64_t fitting = BLOCK_BYTES / (4 * input_stride(op.width)) / TOKENS * TOKENS;
  const int64_t block = fitting < MIN_BLOCK_TOKENS ? MIN_BLOCK_TOKENS : fitting;
  for (int64_t n = 0; n < op.n_tokens; n += block) {
    const int64_t end = n + block < op.n_tokens ? n + block : op.n_tokens;
    block_products(op, w, count, n, end, x, out, stride_out);
  }
}

// SiLU(gate) · up, with the reference's rounding: gate, up, SiLU and the result.
template <class T> INLINE V silu_times(V gate, V up) {
  const V g = rounded<T>(gate);
  return rounded<T>(g / (splat(1.0f) + exponential(-g))) * rounded<T>(up);
}

// Rotates a token's query or key pair, or passes a value pair on, and stores it: `output` is the even row of the weight.
template <class T> INLINE void rotate_and_store(const Op& op, int64_t n, int64_t output, float even, float odd) {
  const int64_t D = op.head_dim, head = output / D, d = output % D;
  const int64_t position = op.positions[n], row = op.rows[n];
  const bool inside = position >= 0 && position < op.length && row >= 0 && row < op.cache_rows;
  float a = rounded_value<T>(even), b = rounded_value<T>(odd);
  if (head < op.n_heads + op.n_kv_heads) {
    const float* angle = op.rope + (inside ? position : 0) * D + d;
    const float x = a, y = b;
    a = x * angle[0] - y * angle[1];
    b = x * angle[1] + y * angle[0];
  }
  T* to;
  if (head < op.n_heads) {
    to = static_cast<T*>(op.out) + (n * op.n_heads + head) * D + d;
  } else {
    if (!inside) return;
    const bool is_key = head < op.n_heads + op.n_kv_heads;
    const int64_t kv_head = head - op.n_heads - (is_key ? 0 : op.n_kv_heads);
    to = static_cast<T*>(is_key ? op.cache_k : op.cache_v) +
         ((row * op.n_kv_heads + kv_head) * op.length + position) * D + d;
  }
  put(to, a);
  put(to + 1, b);
}

// A chunk's sums, (N, stride) from output `begin` on, through the epilogue. `ups`: SWIGLU's second half.
template <class T>
static void finish(const Op& op, int64_t begin, int64_t count, const float* sums, const float* ups, int64_t stride) {
  T* out = static_cast<T*>(op.out);
  const T* residual = static_cast<const T*>(op.residual);
  for (int64_t n = 0; n < op.n_tokens; n++) {
    if (op.epilogue == ROTATE_AND_APPEND) {
      for (int64_t i = 0; i < count; i += 2)
        rotate_and_store<T>(op, n, begin + i, sums[n * stride + i], sums[n * stride + i + 1]);
      continue;
    }
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t at = n * op.outputs + begin + i;
      V y = load(sums + n * stride + i);
      if (op.epilogue == ADD_RESIDUAL) y = rounded<T>(y) + load_up_to(residual + at, count - i);
      if (op.epilogue == SWIGLU) y = silu_times<T>(y, load(ups + n * stride + i));
      store_up_to(out + at, y, count - i);
    }
  }
}

// Adds a value per weight row, from row `begin` on, to the sums of all tokens.
template <class T> static void add_bias(const Op& op, int64_t begin, int64_t count, float* sums, int64_t stride) {
  const T* bias = static_cast<const T*>(op.bias) + begin;
  for (int64_t n = 0; n < op.n_tokens; n++)
    for (int64_t i = 0; i < count; i += LANES) {
      float* at = sums + n * stride + i;
      store(at, load(at) + load_up_to(bias + i, count - i));
    }
}

template <class T> static void linear_chunk(const Op& op, int64_t chunk, Scratch& scratch) {
  const int64_t size = chunk_outputs(op), begin = chunk * size;
  const int64_t count = op.outputs - begin < size ? op.outputs - begin : size;
  const int64_t stride = padded(size);
  float* sums = scratch.results(2 * op.n_tokens * stride);
  float* ups = sums + op.n_tokens * stride;
  const float* x = scratch.inputs(0);
  const T* weight = static_cast<const T*>(op.weight);
  products(op, weight + begin * op.width, count, x, sums, stride);
  if (op.epilogue == SWIGLU) products(op, weight + (op.outputs + begin) * op.width, count, x, ups, stride);
  if (op.bias != nullptr) add_bias<T>(op, begin, count, sums, stride);
  if (op.bias != nullptr && op.epilogue == SWIGLU) add_bias<T>(op, op.outputs + begin, count, ups, stride);
  finish<T>(op, begin, count, sums, ups, stride);
}
