#include "instantiate.hpp"

namespace hyperadam {

extern const InstructionSet avx512 = make_instruction_set<xsimd::avx512bw>();

}  // namespace hyperadam
