// y = epilogue(weight · norm(x) + bias): every projection of a layer, and the head. Included by kernels.hpp.

// SiLU(gate) · up, with the reference's rounding: gate, up, SiLU and the result.
template <class T> INLINE V silu_times(V gate, V up) {
  const V g = rounded<T>(gate);
  return rounded<T>(g / (splat(1.0f) + exponential(-g))) * rounded<T>(up);
}

// Rotates a token's query or key pair, or passes a value pair on, and stores it: `output` is the even row of the weight.
// A key or value whose position is outside the cache, or has no page, is not stored.
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
    const int64_t page = op.pages[row * (op.length / PAGE_TOKENS) + position / PAGE_TOKENS];
    if (page < 0 || page >= op.n_pages) return;
    const bool is_key = head < op.n_heads + op.n_kv_heads;
    const int64_t kv_head = head - op.n_heads - (is_key ? 0 : op.n_kv_heads);
    to = static_cast<T*>(is_key ? op.cache_k : op.cache_v) +
         ((page * op.n_kv_heads + kv_head) * PAGE_TOKENS + position % PAGE_TOKENS) * D + d;
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
  float* sums = scratch.results(2 * op.n_tokens * stride + 2 * scales_of_tile(op, GROUP_ROWS));
  float* ups = sums + op.n_tokens * stride;
  float* memory = ups + op.n_tokens * stride;
  const float* x = scratch.inputs(0);
  products<T>(op, begin, count, x, sums, stride, memory);
  if (op.epilogue == SWIGLU) products<T>(op, op.outputs + begin, count, x, ups, stride, memory);
  if (op.bias != nullptr) add_bias<T>(op, begin, count, sums, stride);
  if (op.bias != nullptr && op.epilogue == SWIGLU) add_bias<T>(op, op.outputs + begin, count, ups, stride);
  finish<T>(op, begin, count, sums, ups, stride);
}
