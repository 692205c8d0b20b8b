#include "instantiate.hpp"

namespace hyperadam {

extern const Kernels portable_kernels = make_kernels<xsimd::default_arch>();

}  // namespace hyperadam
