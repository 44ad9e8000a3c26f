// The kernels with vectors of 128 bits, which every 64-bit processor has: NEON on Arm, elsewhere what the compiler finds.
#define NAME portable
#define LANES 4
#include "kernels.hpp"

namespace fastllama {
#if defined(__aarch64__)
constexpr const char* VECTORS = "neon";
#else
constexpr const char* VECTORS = "portable";
#endif
const Kernels kernels_portable = {VECTORS, portable::prepare, portable::run};
}
