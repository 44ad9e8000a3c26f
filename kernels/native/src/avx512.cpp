// The kernels with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define NAME avx512
#define LANES 16
#include "kernels.hpp"

namespace fastllama {
const Kernels kernels_avx512 = {"avx512", avx512::prepare, avx512::run};
}
#endif
