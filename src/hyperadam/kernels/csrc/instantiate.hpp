// The table of one instruction set. Included once by each arch_*.cpp, which is compiled for it.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "kernels.hpp"

namespace hyperadam {
namespace {

template <class Arch, class Real, class Storage>
constexpr Passes<Real> make_passes() {
  using Pass = Forward<Arch, Real, Storage>;
  return {Pass::features_chunk, Pass::squares_chunk,  Pass::state_chunk,
          Pass::adam_chunk,     Pass::variance_chunk, Pass::shape_chunk};
}

template <class Arch, class Real>
constexpr Kernels<Real> make_kernels() {
  using Pass = Forward<Arch, Real, Real>;
  using Back = Backward<Arch, Real>;
  Passes<Real> small{};
  if constexpr (std::is_same_v<Real, float>) small = make_passes<Arch, float, bfloat16>();
  return {make_passes<Arch, Real, Real>(),
          small,
          {Back::adam_chunk, Back::state_chunk, Back::features_chunk, Back::gradient_layout},
          {Pass::packed_state_cell_size, Pass::pack_state_cell},
          {Pass::packed_adam_cell_size, Pass::pack_adam_cell},
          {Back::state_transposed_size, Back::pack_state_transposed},
          {Back::adam_transposed_size, Back::pack_adam_transposed}};
}

template <class Arch>
constexpr InstructionSet make_instruction_set() {
  return {make_kernels<Arch, float>(), make_kernels<Arch, double>(), standard_normal};
}

}  // namespace
}  // namespace hyperadam
