// An op: what to compute, where its tensors are, and their sizes. kernels/native/library.py has the same struct.
#pragma once
#include <cstdint>

namespace fastllama {

constexpr int64_t ABI_VERSION = 7;  // increased with every change of Op or of an exported function

constexpr int64_t PAGE_TOKENS = 64;  // positions of a cache page, as in kernels/paged_cache.py
constexpr int64_t NO_TOKEN = -1, INACTIVE = -1;  // as in kernels/decode_state.py
constexpr int64_t NO_GUESS = -1;                 // as in kernels/guesses.py

enum Kind : int32_t {
  EMBED, LINEAR, ATTENTION, ATTENTION_MERGE, STATISTICS, SAMPLE, DEQUANTIZE, WINDOW, ACCEPT, LOOK_UP,
  PUT_GUESS
};
enum Dtype : int32_t { FLOAT32, BFLOAT16, FLOAT16 };
enum Format : int32_t { DENSE, INT8, FP8, INT4 };  // of a weight: the model dtype, or as kernels/quantized.py says
enum Epilogue : int32_t { STORE, ADD_RESIDUAL, SWIGLU, ROTATE_AND_APPEND };  // of LINEAR

// Dims as in kernels/reference.py: N tokens (or rows of logits), T cache positions, H heads, K kv heads, D head dim. Of
// ATTENTION, SAMPLE and of the ops from WINDOW on they are the S tokens of each of B = N / S rows, which are adjacent.
// The cache is pages: kernels/paged_cache.py says where a position is.
// Tensors are contiguous and in the model dtype unless a comment says otherwise. Unused fields are 0.
struct Op {
  int32_t kind, dtype, epilogue, has_state;
  int32_t format, scale_dtype, has_zeros;  // of the weight; dtype of the scales and offsets
  const int64_t *tokens, *positions, *rows;  // (N,); ACCEPT: tokens are the draws; WINDOW: rows (B,)
  const void* x;         // (N, width); EMBED: the table (vocab, width); ATTENTION: q (N, H, D); SAMPLE: logits (N, vocab)
  const void* norm;      // (width,) or null: x is normalized first
  const void* weight;    // (outputs, width); SWIGLU: (2 * outputs, width), gate before up; INT4: two columns a byte
  const void* scales;    // (rows of the weight, n_scales)
  const void* offsets;   // the same: zeros where has_zeros, else minima; or null
  const void* bias;      // a value per row of the weight, or null
  const void* residual;  // (N, outputs)
  void* out;             // (N, outputs); DEQUANTIZE: (outputs, width); ATTENTION: (N, H, D); SAMPLE: tokens (N,) int64;
                         // WINDOW: (4, N) int64, the fields of a Window
  const float* rope;     // (T or more, D/2, 2)
  void *cache_k, *cache_v;  // (n_pages, K, PAGE_TOKENS, D)
  const int32_t* pages;     // (cache_rows, length / PAGE_TOKENS): the page table. Any number may be in it
  float* partial;           // ATTENTION: (N, H, groups, D + 2) or null: see attention.hpp; STATISTICS: (N, groups, 4)
  const double *temperature, *top_p;      // (B,)
  const int64_t *seed, *stream, *call;    // (B,)
  float* logprobs;                        // (N,), where has_state is 0; ACCEPT: of the draws
  int64_t *state_tokens, *state_positions;  // (B,), the fields of DecodeState; SAMPLE: where has_state is 1
  const int64_t *starts, *last;             // (B,)
  const bool* is_stop;                      // (B, vocab)
  int64_t* out_tokens;                      // (n_steps, B) with a stride of out_stride: a row's newest steps
  float* out_logprobs;
  int64_t *history, *guesses;  // (B, length) and (B, max_guesses): the fields of Guesses
  int64_t *matched, *newest;   // (B,)
  int64_t n_tokens, width, outputs, n_heads, n_kv_heads, head_dim, length, cache_rows, n_pages, vocab;
  int64_t begin;  // EMBED: the table's first id, or -1 where it is the complete vocabulary; WINDOW: as in checking.py
  int64_t n_steps, out_stride;
  int64_t split, groups;  // a row is divided into splits of so many keys or logits, and they into groups
  int64_t n_scales;  // of a row of the weight
  int64_t tokens_per_row;  // S
  int64_t n_guesses, max_guesses;  // LOOK_UP: guesses to write; columns of `guesses`
  double eps;
};

// How an op is divided into chunks. Results do not depend on it, nor on which thread runs a chunk.
constexpr int64_t CHUNK_BYTES = 128 * 1024;  // of weights
constexpr int64_t MAX_CHUNK_OUTPUTS = 120;   // rows of a weight in a chunk
constexpr int64_t CHUNK_STEP = 12;           // a multiple of the rows of every tile
constexpr int64_t CHUNK_TOKENS = 4;          // of EMBED and ATTENTION_MERGE

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t row_bytes(const Op& op) {  // of the weight's values
  switch (op.format) {
    case DENSE: return op.width * (op.dtype == FLOAT32 ? 4 : 2);
    case INT4: return op.width / 2;
    default: return op.width;
  }
}

inline int64_t chunk_outputs(const Op& op) {
  const int64_t bytes = row_bytes(op) * (op.epilogue == SWIGLU ? 2 : 1);
  const int64_t fitting = CHUNK_BYTES / (bytes > 0 ? bytes : 1) / CHUNK_STEP * CHUNK_STEP;
  return fitting < CHUNK_STEP ? CHUNK_STEP : fitting > MAX_CHUNK_OUTPUTS ? MAX_CHUNK_OUTPUTS : fitting;
}

inline int64_t count_chunks(const Op& op) {
  switch (op.kind) {
    case LINEAR: case DEQUANTIZE: return ceil_div(op.outputs, chunk_outputs(op));
    case ATTENTION: return op.n_tokens / op.tokens_per_row * op.n_kv_heads * (op.partial == nullptr ? 1 : op.groups);
    case STATISTICS: return op.n_tokens * op.groups;
    case SAMPLE: return op.n_tokens;
    case WINDOW: case ACCEPT: case LOOK_UP: case PUT_GUESS: return op.n_tokens / op.tokens_per_row;
    default: return ceil_div(op.n_tokens, CHUNK_TOKENS);
  }
}

// Memory of one thread, kept between ops.
class Scratch {
 public:
  ~Scratch();
  float* inputs(int64_t floats);   // kept between the chunks of an op
  float* results(int64_t floats);  // of one chunk
 private:
  struct Block { float* memory = nullptr; int64_t floats = 0; } inputs_, results_;
  static float* grown(Block& block, int64_t floats);
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*prepare)(const Op& op, Scratch& scratch);  // before a thread's first chunk of an op
  void (*run)(const Op& op, int64_t chunk, Scratch& scratch);
};
extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// The last op of a step, in double precision. `fill_masses` is a kernel of the instruction set: it writes a row of logits
// as float32 and exp((x - max) * inverse) as float64, and returns the sum of the latter.
using FillMasses = double (*)(const Op& op, int64_t row, float max, double inverse, float* x, double* mass);
void sample_row(const Op& op, int64_t row, Scratch& scratch, FillMasses fill_masses);

// One row of WINDOW, ACCEPT, LOOK_UP or PUT_GUESS: of a step that checks guesses.
void check_row(const Op& op, int64_t row);

}  // namespace fastllama
