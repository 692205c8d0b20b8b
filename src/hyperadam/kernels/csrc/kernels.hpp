// The passes by instruction set, as tables of functions.
#pragma once

#include "problem.hpp"

namespace hyperadam {

struct Passes {
  void (*features)(const Config&, const Theta&, const Features&, const Chunk&, std::int64_t index);
  void (*squares)(const Config&, const void* state, int row, int count, const Chunk&,
                  double* totals);
  void (*state_cell)(const Config&, const Theta&, const StateCell&, const Chunk&,
                     std::int64_t index);
  void (*adam_cell)(const Config&, const Theta&, const AdamCell&, const Chunk&,
                    std::int64_t index);
};

struct BackwardPasses {
  using Pass = void (*)(const Config&, const Theta&, const BackwardJob&, const Chunk&,
                        std::int64_t index, float* group);
  Pass adam_cell;
  Pass state_cell;
  Pass features;
  ThetaGradient (*gradient_layout)(const Config&);
};

struct Packing {
  std::int64_t (*size)(const Config&);
  void (*pack)(const Config&, const Theta&, const float* scale_C, float* packed);
};

struct Kernels {
  Passes float32;
  Passes bfloat16;
  BackwardPasses backward;
  Packing state_cell;
  Packing adam_cell;
  Packing state_transposed;
  Packing adam_transposed;
};

extern const Kernels portable_kernels;
#ifdef HYPERADAM_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace hyperadam
