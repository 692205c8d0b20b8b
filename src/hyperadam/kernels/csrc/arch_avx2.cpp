#include "instantiate.hpp"

namespace hyperadam {

extern const InstructionSet avx2 = make_instruction_set<xsimd::fma3<xsimd::avx2>>();

}  // namespace hyperadam
