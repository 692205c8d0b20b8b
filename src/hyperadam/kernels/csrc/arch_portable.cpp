#include "instantiate.hpp"

namespace hyperadam {

extern const InstructionSet portable = make_instruction_set<xsimd::default_arch>();

}  // namespace hyperadam
