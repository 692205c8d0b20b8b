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

struct Kernels {
  Passes float32;
  Passes bfloat16;
  std::int64_t (*packed_state_cell_size)(const Config&);
  std::int64_t (*packed_adam_cell_size)(const Config&);
  void (*pack_state_cell)(const Config&, const Theta&, const float* scale_C, float* packed);
  void (*pack_adam_cell)(const Config&, const Theta&, const float* scale_C, float* packed);
};

extern const Kernels portable_kernels;
#ifdef HYPERADAM_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace hyperadam
