// The passes by instruction set, as tables of functions.
#pragma once

#include "problem.hpp"

namespace hyperadam {

template <class Real>
struct Passes {
  void (*features)(const Config&, const Theta<Real>&, const Features<Real>&, const Chunk&, std::int64_t index);
  void (*squares)(const Config&, const void* state, int row, int count, const Chunk&,
                  double* totals);
  void (*state_cell)(const Config&, const Theta<Real>&, const StateCell<Real>&, const Chunk&,
                     std::int64_t index);
  void (*adam_cell)(const Config&, const Theta<Real>&, const AdamCell<Real>&, const Chunk&,
                    std::int64_t index);
  void (*variance_sums)(const Config&, const VarianceSums<Real>&, const Chunk&,
                        std::int64_t index);
  void (*shape_variance)(const Config&, const VarianceShape<Real>&, const Chunk&);
};

template <class Real>
struct BackwardPasses {
  using Pass = void (*)(const Config&, const Theta<Real>&, const BackwardJob<Real>&, const Chunk&,
                        std::int64_t index, Real* group);
  Pass adam_cell;
  Pass state_cell;
  Pass features;
  ThetaGradient (*gradient_layout)(const Config&);
};

template <class Real>
struct Packing {
  std::int64_t (*size)(const Config&);
  void (*pack)(const Config&, const Theta<Real>&, const Real* scale_C, Real* packed);
};

template <class Real>
struct Kernels {
  Passes<Real> plain;     // state stored as the numbers are
  Passes<Real> bfloat16;  // state stored in bfloat16; float32 only
  BackwardPasses<Real> backward;
  Packing<Real> state_cell;
  Packing<Real> adam_cell;
  Packing<Real> state_transposed;
  Packing<Real> adam_transposed;
};

struct InstructionSet {
  Kernels<float> float32;
  Kernels<double> float64;
  // Standard normal numbers: seed, step, first coordinate, count.
  void (*standard_normal)(std::uint64_t, std::uint64_t, std::uint64_t, std::int64_t, float*);

  template <class Real>
  const Kernels<Real>& of() const;
};

template <>
inline const Kernels<float>& InstructionSet::of<float>() const {
  return float32;
}

template <>
inline const Kernels<double>& InstructionSet::of<double>() const {
  return float64;
}

extern const InstructionSet portable;
#ifdef HYPERADAM_X86
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

}  // namespace hyperadam
