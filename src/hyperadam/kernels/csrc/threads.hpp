// Chunks of work over threads.
//
// With OpenMP, because PyTorch has it too: where both find the same libgomp they share its threads.
// With threads of our own, PyTorch's, which spin for a while after each of its operations, would
// hold the cores (measured on two cores: steps of 16,000 parameters took four times as long).
#pragma once

#include <cstdint>
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace hyperadam {

// While it lives, this thread takes and makes 0 for numbers below the smallest normal one.
//
// A moment of a coordinate whose gradient has become 0 halves from step to step, and a processor
// takes many times as long for an operation on what is left of it. Beside the 1e-24 that is
// added to every second moment it counts for nothing.
class FlushToZero {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushToZero() { _mm_setcsr(before_); }
#else
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  unsigned before_;
#endif
};

// Calls work(0) to work(count - 1), each once. Which thread takes which does not show in a result.
template <class Work>
void parallel_for(std::int64_t count, [[maybe_unused]] int threads, const Work& work) {
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
  {
    const FlushToZero flush;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t index = 0; index < count; ++index) work(index);
  }
}

}  // namespace hyperadam
