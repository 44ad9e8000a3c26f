// All kernels of one instruction set. A source file per instruction set sets NAME and LANES (32-bit lanes of a vector) and
// includes this.
#include "op.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastllama {
namespace {
namespace NAME {

#if defined(__x86_64__)
constexpr bool IS_X86 = true;
#else
constexpr bool IS_X86 = false;
#endif

#include "vector.hpp"
#include "formats.hpp"
#include "inputs.hpp"
#include "products.hpp"
#include "linear.hpp"
#include "dequantize.hpp"
#include "embedding.hpp"
#include "attention.hpp"
#include "statistics.hpp"

template <class T> static void run_typed(const Op& op, int64_t chunk, Scratch& scratch) {
  switch (op.kind) {
    case LINEAR: return linear_chunk<T>(op, chunk, scratch);
    case DEQUANTIZE: return dequantize_chunk<T>(op, chunk, scratch);
    case ATTENTION: return attention_chunk<T>(op, chunk, scratch);
    case STATISTICS: return statistics_chunk<T>(op, chunk);
    case SAMPLE: return sample_row(op, chunk, scratch, fill_masses);
    case WINDOW: case ACCEPT: case LOOK_UP: case PUT_GUESS: return check_row(op, chunk);
  }
  for (int64_t n = chunk * CHUNK_TOKENS; n < (chunk + 1) * CHUNK_TOKENS && n < op.n_tokens; n++) {
    if (op.kind == EMBED) embed<T>(op, n);
    else merge_token<T>(op, n);
  }
}

static void run(const Op& op, int64_t chunk, Scratch& scratch) {
  switch (op.dtype) {
    case BFLOAT16: run_typed<bfloat16>(op, chunk, scratch); break;
    case FLOAT16: run_typed<float16>(op, chunk, scratch); break;
    default: run_typed<float>(op, chunk, scratch);
  }
}

static void prepare(const Op& op, Scratch& scratch) {
  if (op.kind != LINEAR) return;
  switch (op.dtype) {
    case BFLOAT16: prepare_inputs<bfloat16>(op, scratch); break;
    case FLOAT16: prepare_inputs<float16>(op, scratch); break;
    default: prepare_inputs<float>(op, scratch);
  }
}

}  // namespace NAME
}  // namespace
}  // namespace fastllama
