// The kernels with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define NAME avx2
#define LANES 8
#include "kernels.hpp"

namespace fastllama {
const Kernels kernels_avx2 = {"avx2", avx2::prepare, avx2::run};
}
#endif
