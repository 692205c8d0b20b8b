#include "instantiate.hpp"

namespace hyperadam {

extern const Kernels avx512_kernels = make_kernels<xsimd::avx512bw>();

}  // namespace hyperadam
