// Attention of each token over its row's cache, up to its own position. Included by kernels.hpp.
//
// The keys of a row are divided into splits, and the splits into groups: group g has the splits g, g + groups, … with an
// online softmax over them, and the groups' (Σ p·v, max, Σ p) are added in order. A chunk is a row's S adjacent tokens and
// one kv head with its G query heads: a block of keys is read once for all of them, and each token has its own number of
// keys. If there are few rows, so that chunks are few, it is one group only, and ATTENTION_MERGE adds them. A head's sums
// are in the same order whatever it is computed with.

constexpr int64_t BLOCK_KEYS = 64;  // their keys and values stay in the first cache for all query heads
static_assert(BLOCK_KEYS == PAGE_TOKENS);  // a block is one page: its keys are adjacent
constexpr int64_t START_KEYS = 16;         // of a block, prefetched ahead of the others

// p[g][t] = q[g] · k[t] for HEADS query heads and LANES / HEADS keys at a time, whose sums end in one vector. Rows of p
// have BLOCK_KEYS values; those from `count` on are undefined.
template <class T, int HEADS>
INLINE void score_keys(const T* k, const T* v, int64_t count, int64_t D, const float* queries, int64_t stride, float* p) {
  constexpr int KEYS = LANES / HEADS;
  for (int64_t t = 0; t < count; t += KEYS) {
    const T* keys[KEYS];
    for (int i = 0; i < KEYS; i++) keys[i] = k + (t + i < count ? t + i : count - 1) * D;
    V sums[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; i++) {
        const V key = load(keys[i] + d);
        __builtin_prefetch(v + (keys[i] - k) + d);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g * KEYS + i] += key * load(queries + g * stride + d);
      }
    }
    if (d < D) {
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; i++) {
        const V key = load_part(keys[i] + d, D - d);
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++) sums[g * KEYS + i] += key * load(queries + g * stride + d);
      }
    }
    float scores[LANES];
    store(scores, sum_each<LANES>(sums));
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++) __builtin_memcpy(p + g * BLOCK_KEYS + t, scores + g * KEYS, KEYS * sizeof(float));
  }
}

// acc[g][d] = acc[g][d] · scale[g] + Σ p[g][t] · v[t][d] for COUNT vectors of d, of which `left` values are in a row.
// `next`: the keys of the next block, which are prefetched.
template <class T, int HEADS, int COUNT>
INLINE void add_values(const T* next, const T* v, int64_t keys, int64_t D, int64_t left, const float* p, const V* scale,
                       float* acc, int64_t stride) {
  V sums[HEADS][COUNT];
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sums[g][i] = load(acc + g * stride + i * LANES) * scale[g];
  for (int64_t t = 0; t < keys; t++) {
    V values[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) {
      values[i] = load_up_to(v + t * D + i * LANES, left - i * LANES);
      __builtin_prefetch(next + t * D + i * LANES);
    }
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++) {
      const V weight = splat(p[g * BLOCK_KEYS + t]);
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) sums[g][i] += weight * values[i];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) store(acc + g * stride + i * LANES, sums[g][i]);
}

// Adds up to BLOCK_KEYS keys to the running (sum of p·v, max, sum of p) of HEADS query heads.
template <class T, int HEADS>
static void add_keys(const T* k, const T* v, const T* next, int64_t count, int64_t D, const float* queries,
                     int64_t stride, float* acc, float* max, float* total) {
  float p[HEADS * BLOCK_KEYS];
  V scales[HEADS];
  score_keys<T, HEADS>(k, v, count, D, queries, stride, p);
  for (int g = 0; g < HEADS; g++) {
    float* weights = p + g * BLOCK_KEYS;
    for (int64_t t = count; t < BLOCK_KEYS; t++) weights[t] = -__builtin_inff();
    V largest = splat(max[g]);
    for (int64_t t = 0; t < BLOCK_KEYS; t += LANES) largest = larger(load(weights + t), largest);
    const float new_max = max_of(largest);
    scales[g] = exponential(splat(max[g] - new_max));
    V sums = {};
    for (int64_t t = 0; t < BLOCK_KEYS; t += LANES) {
      const V e = exponential(load(weights + t) - splat(new_max));
      store(weights + t, e);
      sums += e;
    }
    total[g] = total[g] * scales[g][0] + sum(sums);
    max[g] = new_max;
  }
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES)
    add_values<T, HEADS, 4>(next + d, v + d, count, D, 4 * LANES, p, scales, acc + d, stride);
  for (; d < D; d += LANES) add_values<T, HEADS, 1>(next + d, v + d, count, D, D - d, p, scales, acc + d, stride);
}

// All G query heads of a kv head, as many at a time as the registers take.
template <class T>
static void add_keys_to_heads(const T* k, const T* v, const T* next, int64_t count, int64_t D, int64_t G,
                              const float* queries, int64_t stride, float* acc, float* max, float* total) {
  constexpr int MOST = HAS_32_REGISTERS ? 4 : 2;
  int64_t g = 0;
  for (; g + MOST <= G; g += MOST)
    add_keys<T, MOST>(k, v, next, count, D, queries + g * stride, stride, acc + g * stride, max + g, total + g);
  for (; g < G; g++)
    add_keys<T, 1>(k, v, next, count, D, queries + g * stride, stride, acc + g * stride, max + g, total + g);
}

// A row's tokens in a batch. All have the row of the first.
struct RowTokens {
  const Op& op;
  int64_t first, count;
  int64_t row() const { return op.rows[first]; }
  int64_t length(int64_t s) const {  // keys of token s; 0: it is inactive
    const int64_t position = op.positions[first + s];
    if (position < 0 || row() < 0 || row() >= op.cache_rows) return 0;
    return position < op.length ? position + 1 : op.length;
  }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < count; s++) most = length(s) > most ? length(s) : most;
    return most;
  }
};

// The queries of the tokens' heads of one kv head, S · G of them, and the running sums of a group.
struct Heads {
  int64_t stride;  // of a head's queries and sums
  float *queries, *acc, *max, *total;
};

// Where a kv head's keys, or values, of the row's block at position t begin in the cache. A number that is no page's
// stands for the nearest page: whatever the table holds, nothing outside the cache is read.
INLINE int64_t block_at(const Op& op, const int32_t* pages, int64_t kv_head, int64_t t) {
  const int64_t number = pages[t / PAGE_TOKENS], last = op.n_pages - 1;
  const int64_t page = number < 0 ? 0 : number < last ? number : last;
  return (page * op.n_kv_heads + kv_head) * PAGE_TOKENS * op.head_dim;
}

// Prefetches the first keys, or values, of a block. The processor's own prefetching ends with each page, and takes some
// misses to begin again.
template <class T> INLINE void prefetch_start(const T* block, int64_t D) {
  for (int64_t i = 0; i < START_KEYS * D; i += LINE_BYTES / int64_t(sizeof(T))) __builtin_prefetch(block + i);
}

// Adds the block at position t to the running sums of all tokens that have keys in it, up to `end` where the split ends.
// Adjacent tokens with as many keys, which is most, are so many more heads.
template <class T>
static void add_block(const RowTokens& tokens, const T* k, const T* v, const T* next, int64_t t, int64_t end, int64_t D,
                      int64_t G, const Heads& heads) {
  const auto count = [&](int64_t s) {
    const int64_t length = tokens.length(s), stop = length < end ? length : end;
    return stop - t < BLOCK_KEYS ? stop - t : BLOCK_KEYS;
  };
  for (int64_t s = 0, following; s < tokens.count; s = following) {
    const int64_t keys = count(s);
    for (following = s + 1; following < tokens.count && count(following) == keys;) following++;
    if (keys <= 0) continue;
    const int64_t g = s * G;
    add_keys_to_heads(k, v, next, keys, D, (following - s) * G, heads.queries + g * heads.stride, heads.stride,
                      heads.acc + g * heads.stride, heads.max + g, heads.total + g);
  }
}

// The splits of one group, to heads.acc, max and total. A split is a number of whole blocks.
template <class T>
static void attend(const RowTokens& tokens, int64_t length, int64_t kv_head, int64_t group, const Heads& heads) {
  const Op& op = tokens.op;
  const int64_t D = op.head_dim, G = op.n_heads / op.n_kv_heads;
  const int32_t* pages = op.pages + tokens.row() * (op.length / PAGE_TOKENS);
  const T *k = static_cast<const T*>(op.cache_k), *v = static_cast<const T*>(op.cache_v);
  int64_t at = block_at(op, pages, kv_head, group * op.split);  // the caller knows that the group has keys
  __builtin_memset(heads.acc, 0, tokens.count * G * heads.stride * sizeof(float));
  for (int64_t g = 0; g < tokens.count * G; g++) heads.max[g] = -__builtin_inff(), heads.total[g] = 0;
  for (int64_t split = group * op.split; split < length; split += op.groups * op.split) {
    const int64_t end = split + op.split < length ? split + op.split : length;
    for (int64_t t = split; t < end; t += BLOCK_KEYS) {
      int64_t following = t + BLOCK_KEYS < end ? t + BLOCK_KEYS : split + op.groups * op.split;
      if (following >= length) following = (group + 1) * op.split;  // the thread's next chunk, as a rule
      // After the row's last block, the prefetch meets keys that are in the first cache already.
      const int64_t next = following < length ? block_at(op, pages, kv_head, following) : at;
      prefetch_start(v + at, D);
      prefetch_start(k + next, D);
      add_block(tokens, k + at, v + at, k + next, t, end, D, G, heads);
      at = next;
    }
  }
}

// The sums of a token's heads, from head `first` of `heads` on, to parts[g][group].
INLINE void store_parts(const Op& op, int64_t group, const Heads& heads, int64_t first, float* parts) {
  const int64_t D = op.head_dim, G = op.n_heads / op.n_kv_heads;
  for (int64_t g = 0; g < G; g++) {
    float* part = parts + (g * op.groups + group) * (D + 2);
    const float* acc = heads.acc + (first + g) * heads.stride;
    for (int64_t d = 0; d < D; d += LANES) store_up_to(part + d, load(acc + d), D - d);
    part[D] = heads.max[first + g], part[D + 1] = heads.total[first + g];
  }
}

// out[h] (D,) of `heads` heads, from the first `used` of all groups: parts[h][group] has D sums, the max and Σ p.
template <class T>
static void merge_groups(const float* parts, int64_t heads, int64_t used, int64_t all, int64_t D, T* out) {
  for (int64_t h = 0; h < heads; h++, parts += all * (D + 2), out += D) {
    float max = -__builtin_inff(), total = 0;
    for (int64_t g = 0; g < used; g++) max = parts[g * (D + 2) + D] > max ? parts[g * (D + 2) + D] : max;
    for (int64_t g = 0; g < used; g++)
      total += exponential(splat(parts[g * (D + 2) + D] - max))[0] * parts[g * (D + 2) + D + 1];
    for (int64_t d = 0; d < D; d += LANES) {
      V sums = {};
      for (int64_t g = 0; g < used; g++)
        sums += exponential(splat(parts[g * (D + 2) + D] - max)) * load_up_to(parts + g * (D + 2) + d, D - d);
      store_up_to(out + d, sums / splat(total), D - d);
    }
  }
}

INLINE int64_t used_groups(const Op& op, int64_t length) {
  const int64_t splits = ceil_div(length, op.split);
  return splits < op.groups ? splits : op.groups;
}

// The tokens' queries of the heads of one kv head, times 1 / √D.
template <class T> static void load_queries(const RowTokens& tokens, int64_t kv_head, const Heads& heads) {
  const Op& op = tokens.op;
  const int64_t D = op.head_dim, G = op.n_heads / op.n_kv_heads;
  const V scale = splat(1.0f / __builtin_sqrtf(float(D)));
  for (int64_t i = 0; i < tokens.count * G; i++) {
    const T* q = static_cast<const T*>(op.x) + ((tokens.first + i / G) * op.n_heads + kv_head * G + i % G) * D;
    for (int64_t d = 0; d < D; d += LANES) store(heads.queries + i * heads.stride + d, load_up_to(q + d, D - d) * scale);
  }
}

template <class T> static void attention_chunk(const Op& op, int64_t chunk, Scratch& scratch) {
  const bool one_group = op.partial != nullptr;  // ATTENTION_MERGE adds the groups; else this chunk does
  const int64_t group = one_group ? chunk % op.groups : 0;
  if (one_group) chunk /= op.groups;
  const int64_t D = op.head_dim, G = op.n_heads / op.n_kv_heads, stride = padded(D), S = op.tokens_per_row;
  const int64_t kv_head = chunk % op.n_kv_heads;
  const RowTokens tokens = {op, chunk / op.n_kv_heads * S, S};
  const int64_t length = tokens.longest(), used = used_groups(op, length), size = G * op.groups * (D + 2);
  float* memory = scratch.results(2 * S * G * (stride + 1) + S * size);
  float* sums = memory + S * G * stride;
  const Heads heads = {stride, memory, sums, sums + S * G * stride, sums + S * G * stride + S * G};
  // A token's partial results, and where they are adjacent for the tokens.
  float* parts = one_group ? op.partial + (tokens.first * op.n_heads + kv_head * G) * op.groups * (D + 2)
                           : memory + 2 * S * G * (stride + 1);
  const int64_t stride_parts = one_group ? op.n_heads * op.groups * (D + 2) : size;
  if (group < used) load_queries<T>(tokens, kv_head, heads);
  for (int64_t i = group; i < (one_group ? group + 1 : used) && i < used; i++) {
    attend<T>(tokens, length, kv_head, i, heads);
    for (int64_t s = 0; s < S; s++)
      if (i < used_groups(op, tokens.length(s))) store_parts(op, i, heads, s * G, parts + s * stride_parts);
  }
  for (int64_t s = 0; s < S; s++) {
    T* out = static_cast<T*>(op.out) + ((tokens.first + s) * op.n_heads + kv_head * G) * D;
    const int64_t of_token = used_groups(op, tokens.length(s));
    if (of_token == 0 && group == 0) __builtin_memset(out, 0, G * D * sizeof(T));
    if (of_token > group && (!one_group || of_token == 1))
      merge_groups(parts + s * stride_parts, G, of_token, op.groups, D, out);
  }
}

template <class T> static void merge_token(const Op& op, int64_t n) {
  const int64_t s = n % op.tokens_per_row, D = op.head_dim, first = n * op.n_heads;
  const int64_t used = used_groups(op, RowTokens{op, n - s, op.tokens_per_row}.length(s));
  if (used > 1)
    merge_groups(op.partial + first * op.groups * (D + 2), op.n_heads, used, op.groups, D,
                 static_cast<T*>(op.out) + first * D);
}
