// The table of one instruction set. Included once by each arch_*.cpp, which is compiled for it.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "kernels.hpp"

namespace hyperadam {
namespace {

template <class Arch, class Storage>
constexpr Passes make_passes() {
  using Pass = Forward<Arch, Storage>;
  return {Pass::features_chunk, Pass::squares_chunk, Pass::state_chunk, Pass::adam_chunk};
}

template <class Arch>
constexpr Kernels make_kernels() {
  using Pass = Forward<Arch, float>;
  using Back = Backward<Arch>;
  return {make_passes<Arch, float>(),
          make_passes<Arch, bfloat16>(),
          {Back::adam_chunk, Back::state_chunk, Back::features_chunk, Back::gradient_layout},
          {Pass::packed_state_cell_size, Pass::pack_state_cell},
          {Pass::packed_adam_cell_size, Pass::pack_adam_cell},
          {Back::state_transposed_size, Back::pack_state_transposed},
          {Back::adam_transposed_size, Back::pack_adam_transposed}};
}

}  // namespace
}  // namespace hyperadam
