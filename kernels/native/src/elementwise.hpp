// Ops without a weight, a few tokens per chunk: the embedding, and parts of the projections for callers that need one
// alone. Included by kernels.hpp.

template <class T> static void embed(const Op& op, int64_t n) {
  const int64_t begin = op.begin < 0 ? 0 : op.begin, id = op.tokens[n] - begin;
  const int64_t inside = id < 0 ? 0 : id >= op.vocab ? op.vocab - 1 : id;
  T* out = static_cast<T*>(op.out) + n * op.width;
  const T* row = static_cast<const T*>(op.x) + inside * op.width;
  if (op.begin >= 0 && inside != id) __builtin_memset(out, 0, op.width * sizeof(T));
  else __builtin_memcpy(out, row, op.width * sizeof(T));
}

template <class T> static void rms_norm(const Op& op, int64_t n, Scratch& scratch) {
  float* row = scratch.results(padded(op.width));
  const int64_t at = n * op.width;
  normalized_row(static_cast<const T*>(op.x) + at, static_cast<const T*>(op.norm), op.eps, row, op.width);
  T* out = static_cast<T*>(op.out) + at;
  for (int64_t i = 0; i < op.width; i += LANES) store_up_to(out + i, load(row + i), op.width - i);
}

template <class T> static void silu_mul(const Op& op, int64_t n) {
  const T* gate = static_cast<const T*>(op.x) + n * 2 * op.outputs;
  T* out = static_cast<T*>(op.out) + n * op.outputs;
  for (int64_t i = 0; i < op.outputs; i += LANES) {
    const int64_t left = op.outputs - i;
    store_up_to(out + i, silu_times<T>(load_up_to(gate + i, left), load_up_to(gate + op.outputs + i, left)), left);
  }
}

template <class T> static void rope_append(const Op& op, int64_t n) {
  const int64_t width = (op.n_heads + 2 * op.n_kv_heads) * op.head_dim;
  const T* heads = static_cast<const T*>(op.x) + n * width;
  for (int64_t i = 0; i < width; i += 2) rotate_and_store<T>(op, n, i, get(heads + i), get(heads + i + 1));
}

template <class T> static void elementwise_chunk(const Op& op, int64_t chunk, Scratch& scratch) {
  const int64_t begin = chunk * ELEMENTWISE_TOKENS;
  const int64_t end = begin + ELEMENTWISE_TOKENS < op.n_tokens ? begin + ELEMENTWISE_TOKENS : op.n_tokens;
  for (int64_t n = begin; n < end; n++) {
    switch (op.kind) {
      case EMBED: embed<T>(op, n); break;
      case RMS_NORM: rms_norm<T>(op, n, scratch); break;
      case SILU_MUL: silu_mul<T>(op, n); break;
      case ROPE_APPEND: rope_append<T>(op, n); break;
    }
  }
}
