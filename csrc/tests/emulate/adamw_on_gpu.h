// Included before test_adamw*.cpp: the same tests for the CUDA kernels.
#include <vector>

#include "fastft/adamw.h"

// Every second call as under graph capture, with the table in memory of the caller's.
inline void* adamw_scratch(std::size_t count) {
  static std::vector<double> memory;
  static unsigned calls = 0;
  memory.resize(count * fastft::kAdamWScratch / sizeof(double) + 1);
  return calls++ % 2 == 0 ? nullptr : memory.data();
}
#define adamw_cpu(tensors, count, options, threads) \
  adamw_cuda(tensors, count, options, 0, nullptr, adamw_scratch(count))
