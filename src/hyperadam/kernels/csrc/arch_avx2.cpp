#include "instantiate.hpp"

namespace hyperadam {

extern const Kernels avx2_kernels = make_kernels<xsimd::fma3<xsimd::avx2>>();

}  // namespace hyperadam
