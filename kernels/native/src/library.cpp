// The functions that kernels/native/library.py calls.
#include <atomic>
#include <cstring>

#include "op.hpp"
#include "pool.hpp"

namespace fastllama {
namespace {

bool runs_here([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all that have them have F16C
  if (&kernels == &kernels_avx2) return avx2;
  if (&kernels == &kernels_avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

const Kernels* const known[] = {  // the best first
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable};

const Kernels* best() {
  for (const Kernels* kernels : known)
    if (runs_here(*kernels)) return kernels;
  return &kernels_portable;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace
}  // namespace fastllama

using namespace fastllama;

extern "C" {
#pragma GCC visibility push(default)

int64_t fastllama_abi() { return ABI_VERSION * 65536 + int64_t(sizeof(Op)); }

// Runs the ops in order.
void fastllama_run(const Op* ops, int n_ops, int n_threads) {
  const Kernels* kernels = selected.load();
  if (kernels == nullptr) selected.store(kernels = best());
  run_ops(ops, n_ops, n_threads, *kernels);
}

// Selects the kernels of an instruction set by name, or the best for an empty name. False: they do not run here.
int fastllama_select(const char* name) {
  if (*name == 0) return selected.store(best()), 1;
  for (const Kernels* kernels : known)
    if (std::strcmp(kernels->name, name) == 0 && runs_here(*kernels)) return selected.store(kernels), 1;
  return 0;
}

const char* fastllama_selected() {
  const Kernels* kernels = selected.load();
  return (kernels == nullptr ? best() : kernels)->name;
}

// Whether the processor multiplies bfloat16, which libraries use for many tokens.
int fastllama_multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 0;
#endif
}

#pragma GCC visibility pop
}  // extern "C"
