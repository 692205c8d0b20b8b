// Chunks of work over threads.
//
// With OpenMP, because PyTorch has it too: where both find the same libgomp they share its threads.
// With threads of our own, PyTorch's, which spin for a while after each of its operations, would
// hold the cores (measured on two cores: steps of 16,000 parameters took four times as long).
#pragma once

#include <cstdint>

namespace hyperadam {

// Calls work(0) to work(count - 1), each once. Which thread takes which does not show in a result.
template <class Work>
void parallel_for(std::int64_t count, [[maybe_unused]] int threads, const Work& work) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (std::int64_t index = 0; index < count; ++index) work(index);
}

}  // namespace hyperadam
