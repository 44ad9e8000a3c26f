// Attention of each token over its row's cache, up to its own position. Included by kernels.hpp.
//
// A chunk is one token, one kv head with its G query heads, and one group of splits: group g has the splits g, g + groups,
// … with an online softmax over them. A row of one split is finished by its
// chunk. Longer rows' groups leave (Σ p·v, max, Σ p) for ATTENTION_MERGE, which adds them in order.

constexpr int64_t BLOCK_KEYS = 64;  // their keys and values stay in the first cache for all query heads

INLINE int64_t row_length(const Op& op, int64_t n) {  // 0: an inactive row
  const int64_t position = op.positions[n], row = op.rows[n];
  if (position < 0 || row < 0 || row >= op.cache_rows) return 0;
  return position < op.length ? position + 1 : op.length;
}

template <class T> INLINE float dot(const T* key, const float* query, int64_t D) {
  V sums = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) sums += load(key + d) * load(query + d);
  if (d < D) sums += load_part(key + d, D - d) * load(query + d);
  return sum(sums);
}

// acc[d] = acc[d] · scale + Σ p[t] · v[t][d] for COUNT vectors of d.
template <class T, int COUNT>
INLINE void add_values(const T* v, int64_t keys, int64_t D, const float* p, V scale, float* acc) {
  V sums[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) sums[i] = load(acc + i * LANES) * scale;
  for (int64_t t = 0; t < keys; t++) {
    const V weight = splat(p[t]);
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sums[i] += weight * load(v + t * D + i * LANES);
  }
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) store(acc + i * LANES, sums[i]);
}

// Adds up to BLOCK_KEYS keys to a query head's running (sum of p·v, max, sum of p).
template <class T>
static void add_keys(const T* k, const T* v, int64_t count, int64_t D, const float* query, float* acc, float& max,
                     float& total) {
  float p[BLOCK_KEYS];
  float new_max = max;
  for (int64_t t = 0; t < count; t++) {
    p[t] = dot(k + t * D, query, D);
    new_max = p[t] > new_max ? p[t] : new_max;
  }
  for (int64_t t = count; t < BLOCK_KEYS; t++) p[t] = -__builtin_inff();
  const V scale = exponential(splat(max - new_max));
  V sums = {};
  for (int64_t t = 0; t < BLOCK_KEYS; t += LANES) {
    const V weights = exponential(load(p + t) - splat(new_max));
    store(p + t, weights);
    sums += weights;
  }
  total = total * scale[0] + sum(sums);
  max = new_max;
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) add_values<T, 4>(v + d, count, D, p, scale, acc + d);
  for (; d + LANES <= D; d += LANES) add_values<T, 1>(v + d, count, D, p, scale, acc + d);
  if (d < D) {
    V out = load(acc + d) * scale;
    for (int64_t t = 0; t < count; t++) out += splat(p[t]) * load_part(v + t * D + d, D - d);
    store(acc + d, out);
  }
}

template <class T> static void attention_chunk(const Op& op, int64_t chunk, Scratch& scratch) {
  const int64_t groups = op.groups, D = op.head_dim, G = op.n_heads / op.n_kv_heads, stride = padded(D);
  const int64_t group = chunk % groups, kv_head = chunk / groups % op.n_kv_heads, n = chunk / groups / op.n_kv_heads;
  const int64_t length = row_length(op, n);
  T* out = static_cast<T*>(op.out) + (n * op.n_heads + kv_head * G) * D;
  if (group * op.split >= length) {
    if (length == 0 && group == 0) __builtin_memset(out, 0, G * D * sizeof(T));
    return;
  }
  float* queries = scratch.results(2 * G * stride + 2 * G);
  float *acc = queries + G * stride, *max = acc + G * stride, *total = max + G;
  const V scale = splat(1.0f / __builtin_sqrtf(float(D)));
  for (int64_t g = 0; g < G; g++) {
    const T* q = static_cast<const T*>(op.x) + (n * op.n_heads + kv_head * G + g) * D;
    for (int64_t d = 0; d < D; d += LANES) {
      store(queries + g * stride + d, load_up_to(q + d, D - d) * scale);
      store(acc + g * stride + d, V{});
    }
    max[g] = -__builtin_inff(), total[g] = 0;
  }
  const int64_t head = (op.rows[n] * op.n_kv_heads + kv_head) * op.length * D;
  const T *k = static_cast<const T*>(op.cache_k) + head, *v = static_cast<const T*>(op.cache_v) + head;
  for (int64_t split = group * op.split; split < length; split += groups * op.split) {
    const int64_t end = split + op.split < length ? split + op.split : length;
    for (int64_t t = split; t < end; t += BLOCK_KEYS) {
      const int64_t count = end - t < BLOCK_KEYS ? end - t : BLOCK_KEYS;
      for (int64_t g = 0; g < G; g++)
        add_keys(k + t * D, v + t * D, count, D, queries + g * stride, acc + g * stride, max[g], total[g]);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    float* partial = op.partial + ((n * op.n_heads + kv_head * G + g) * groups + group) * (D + 2);
    for (int64_t d = 0; d < D; d += LANES) {
      const V sums = load(acc + g * stride + d);
      if (length <= op.split) store_up_to(out + g * D + d, sums / splat(total[g]), D - d);
      else store_up_to(partial + d, sums, D - d);
    }
    if (length > op.split) partial[D] = max[g], partial[D + 1] = total[g];
  }
}

template <class T> static void merge_token(const Op& op, int64_t n) {
  const int64_t length = row_length(op, n), D = op.head_dim, all = op.groups;
  if (length <= op.split) return;
  const int64_t used = ceil_div(length, op.split) < all ? ceil_div(length, op.split) : all;
  for (int64_t h = 0; h < op.n_heads; h++) {
    const float* parts = op.partial + (n * op.n_heads + h) * all * (D + 2);
    float max = -__builtin_inff(), total = 0;
    for (int64_t g = 0; g < used; g++) max = parts[g * (D + 2) + D] > max ? parts[g * (D + 2) + D] : max;
    for (int64_t g = 0; g < used; g++)
      total += exponential(splat(parts[g * (D + 2) + D] - max))[0] * parts[g * (D + 2) + D + 1];
    T* out = static_cast<T*>(op.out) + (n * op.n_heads + h) * D;
    for (int64_t d = 0; d < D; d += LANES) {
      V sums = {};
      for (int64_t g = 0; g < used; g++)
        sums += exponential(splat(parts[g * (D + 2) + D] - max)) * load_up_to(parts + g * (D + 2) + d, D - d);
      store_up_to(out + d, sums / splat(total), D - d);
    }
  }
}
