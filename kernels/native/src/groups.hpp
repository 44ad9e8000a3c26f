// Products with weights that have a scale, and maybe an offset, for each group of columns. Included by products.hpp.
//
//     Σ w·x = Σ_groups scale · (Σ q·x) + Σ_groups offset · (Σ x)
//
// A tile goes through blocks of columns. A block's sums Σ q·x, one vector per weight row and token, are multiplied by the
// scales of their lanes and added to the tile's sums. The sums of x are computed once per token.

// Measured. The sums of 4 rows and 4 tokens do not all fit the registers, but a block needs them only once.
constexpr int GROUP_ROWS = HAS_32_REGISTERS ? 4 : 2;
constexpr int GROUP_TOKENS = HAS_32_REGISTERS ? 4 : 2;

// Weight rows from one on, with their scales and offsets in float32.
struct GroupRows {
  const char* values;
  const float *scales, *offsets;  // offsets may be null
  int64_t row_bytes, width, n_scales, prefetch;
  int64_t blocks_per_step, step;  // the next blocks use the scales that lie `step` further on
  VI scale_of_lane;
};

// A block of columns of 8-bit numbers.
template <class Q> struct Bytes {
  static constexpr int64_t COLUMNS = 32, BYTES = 32;
  static constexpr int VECTORS = COLUMNS / LANES;
  static constexpr float SCALE_UNIT = UNIT<Q>;
  const Q* values;
  static Bytes read(const char* p) { return {reinterpret_cast<const Q*>(p)}; }
  V vector(int k) const { return load(values + k * LANES); }
  static VI scale_of_lane(int64_t) { return VI{}; }
  static V scale(const float* from, VI) { return splat(*from); }
};

// A block of columns of 4-bit numbers: see reorder_for_int4.
struct Nibbles {
  static constexpr int64_t COLUMNS = INT4_BLOCK, BYTES = COLUMNS / 2;
  static constexpr int VECTORS = NIBBLES;
  static constexpr float SCALE_UNIT = 1;
  VU words;
  static Nibbles read(const char* p) {
    Nibbles block;
    __builtin_memcpy(&block.words, p, BYTES);
    return block;
  }
  static Nibbles read_part(const char* p, int64_t bytes) {
    Nibbles block = {};
    __builtin_memcpy(&block.words, p, bytes);
    return block;
  }
  V vector(int k) const { return nibbles(words, k); }
  static VI scale_of_lane(int64_t group_size) {
    VI index = {};
    for (int i = 0; i < LANES; i++) index[i] = group_size < COLUMNS ? i * NIBBLES / int(group_size) : 0;
    return index;
  }
  static V scale(const float* from, VI of_lane) {
    if constexpr (COLUMNS <= MIN_GROUP) return splat(*from);
    else return permuted(load(from), of_lane);
  }
};

// sums[n][r] += scale[r] · Σ q · x[n], of one block.
template <class Block, int R, int N>
INLINE void add_block(const Block* blocks, const V* scales, const float* x, int64_t stride_x, V* sums) {
  V parts[N * R];
#pragma GCC unroll 16
  for (int k = 0; k < Block::VECTORS; k++) {
    V rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) rows[r] = blocks[r].vector(k);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const V v = load(x + n * stride_x + k * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        parts[n * R + r] = k == 0 ? rows[r] * v : multiply_add(rows[r], v, parts[n * R + r]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N * R; i++) sums[i] = multiply_add(parts[i], scales[i % R], sums[i]);
}

// out[n][r] for R weight rows and N tokens. `x_sums` has the tokens' sums over groups, with the stride of x. A function of
// its own, for which the compiler allocates the registers.
template <class Block, int R, int N>
static __attribute__((noinline)) void group_tile(const GroupRows& w, const float* x, int64_t stride_x,
                                                 const float* x_sums, float* out, int64_t stride_out) {
  constexpr int64_t COLUMNS = Block::COLUMNS;
  const char* values = w.values;
  const float* scales = w.scales;
  V sums[N * R] = {}, scale[R];
  Block blocks[R];
  int64_t i = 0, left = w.blocks_per_step;
  for (; i + COLUMNS <= w.width; i += COLUMNS, values += Block::BYTES) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(values + r * w.row_bytes + w.prefetch, 0, ONCE);
      blocks[r] = Block::read(values + r * w.row_bytes);
      scale[r] = Block::scale(scales + r * w.n_scales, w.scale_of_lane);
    }
    add_block<Block, R, N>(blocks, scale, x + i, stride_x, sums);
    if (--left == 0) left = w.blocks_per_step, scales += w.step;
  }
  if constexpr (same<Block, Nibbles>) {
    if (i < w.width) {
      for (int r = 0; r < R; r++) {
        blocks[r] = Block::read_part(values + r * w.row_bytes, (w.width - i) / 2);
        scale[r] = Block::scale(scales + r * w.n_scales, w.scale_of_lane);
      }
      add_block<Block, R, N>(blocks, scale, x + i, stride_x, sums);
    }
  }
  if (w.offsets != nullptr)
    for (int64_t g = 0; g < w.n_scales; g += LANES)
#pragma GCC unroll 32
      for (int j = 0; j < N * R; j++)
        sums[j] = multiply_add(load(w.offsets + j % R * w.n_scales + g), load(x_sums + j / R * stride_x + g), sums[j]);
  float results[N * R];
  sum_all<N * R>(sums, results);
  for (int n = 0; n < N; n++) __builtin_memcpy(out + n * stride_out, results + n * R, R * sizeof(float));
}

template <class Block, int R, int N>
INLINE void group_tiles(const GroupRows& w, const float* x, int64_t stride_x, const float* x_sums, int64_t n_tokens,
                        float* out, int64_t stride_out) {
  for (; n_tokens >= N; n_tokens -= N, x += N * stride_x, x_sums += N * stride_x, out += N * stride_out)
    group_tile<Block, R, N>(w, x, stride_x, x_sums, out, stride_out);
  if constexpr (N > 1)
    if (n_tokens > 0) group_tiles<Block, R, N - 1>(w, x, stride_x, x_sums, n_tokens, out, stride_out);
}

template <class Block> static GroupRows group_rows(const Op& op, float* memory) {
  GroupRows w;
  const int64_t group_size = op.width / op.n_scales;
  w.scales = memory;
  w.offsets = op.offsets == nullptr ? nullptr : memory + scales_of_tile(op, GROUP_ROWS);
  w.row_bytes = row_bytes(op), w.width = op.width, w.n_scales = op.n_scales;
  w.prefetch = prefetch_distance(GROUP_ROWS * w.row_bytes);
  w.blocks_per_step = group_size > Block::COLUMNS ? ceil_div(group_size, Block::COLUMNS) : 1;
  w.step = group_size < Block::COLUMNS ? Block::COLUMNS / group_size : 1;
  w.scale_of_lane = Block::scale_of_lane(group_size);
  return w;
}

// out[n][r] for `count` weight rows from `row` on and n_tokens tokens. `memory` is for scales.
template <class Block>
static void group_products(const Op& op, int64_t row, int64_t count, const float* x, int64_t n_tokens, float* out,
                           int64_t stride_out, float* memory) {
  GroupRows w = group_rows<Block>(op, memory);
  const int64_t stride_x = input_stride(op);
  const float* x_sums = x + input_width(op);
  for (int64_t r = 0, rows; r < count; r += rows) {
    rows = count - r < GROUP_ROWS ? 1 : GROUP_ROWS;
    widen_scales(op, Block::SCALE_UNIT, row + r, rows, memory, memory + scales_of_tile(op, GROUP_ROWS));
    w.values = static_cast<const char*>(op.weight) + (row + r) * w.row_bytes;
    if (rows == 1) group_tiles<Block, 1, GROUP_TOKENS>(w, x, stride_x, x_sums, n_tokens, out + r, stride_out);
    else group_tiles<Block, GROUP_ROWS, GROUP_TOKENS>(w, x, stride_x, x_sums, n_tokens, out + r, stride_out);
  }
}
