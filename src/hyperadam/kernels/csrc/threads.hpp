// Chunks of work over threads.
//
// Threads live for one call: nothing is left behind that a fork would break or that would compete
// with PyTorch's own. Which thread takes a chunk does not show in the result.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace hyperadam {

template <class Work>
void parallel_for(std::int64_t count, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto run = [&] {
    for (;;) {
      const std::int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      work(index);
    }
  };
  const std::int64_t helpers = (threads < count ? threads : count) - 1;
  std::vector<std::thread> pool;
  pool.reserve(helpers > 0 ? static_cast<std::size_t>(helpers) : 0);
  try {
    for (std::int64_t i = 0; i < helpers; ++i) pool.emplace_back(run);
  } catch (const std::system_error&) {
    // The system has no more threads: those that there are do the work.
  }
  run();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace hyperadam
