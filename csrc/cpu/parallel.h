// A parallel loop for work that is bound by memory. Included only by files compiled for the baseline CPU.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace fastft::cpu {

// body(i) for i in [0, n). Thread t starts with the t-th contiguous share, so it meets the same addresses every step
// and they stay on its NUMA node; a thread that is done takes pieces from the others' shares. With a fixed split alone,
// one core that is also busy with something else (a data loader, say) holds up the whole step.
template <class Body>
void for_each_stealing(std::int64_t n, int threads, const Body& body) {
  struct alignas(64) Next {
    std::atomic<std::int64_t> i{0};
  };
  if (threads > n) threads = n > 1 ? static_cast<int>(n) : 1;
  std::vector<Next> next(static_cast<std::size_t>(threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    for (int k = 0; k < team; ++k) {
      const int owner = (self + k) % team;
      const std::int64_t begin = n * owner / team, end = n * (owner + 1) / team;
      for (;;) {
        const std::int64_t i = begin + next[static_cast<std::size_t>(owner)].i.fetch_add(1, std::memory_order_relaxed);
        if (i >= end) break;
        body(i);
      }
    }
  }
}

}  // namespace fastft::cpu
