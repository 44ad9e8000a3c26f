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
#include "products.hpp"
#include "elementwise.hpp"
#include "attention.hpp"
#include "statistics.hpp"

template <class T> static void run_typed(const Op& op, int64_t chunk, Scratch& scratch) {
  switch (op.kind) {
    case LINEAR: linear_chunk<T>(op, chunk, scratch); break;
    case ATTENTION: attention_chunk<T>(op, chunk, scratch); break;
    case ATTENTION_MERGE:
      for (int64_t n = chunk * ELEMENTWISE_TOKENS; n < (chunk + 1) * ELEMENTWISE_TOKENS && n < op.n_tokens; n++)
        merge_token<T>(op, n);
      break;
    case STATISTICS: statistics_chunk<T>(op, chunk); break;
    case SAMPLE: sample_row(op, chunk, scratch, fill_masses); break;
    default: elementwise_chunk<T>(op, chunk, scratch);
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
