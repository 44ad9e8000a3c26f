// The kernels with vectors of 128 bits, which every 64-bit processor has (SSE2, NEON).
#define NAME portable
#define LANES 4
#include "kernels.hpp"

namespace fastllama {
const Kernels kernels_portable = {"portable", portable::prepare, portable::run};
}
