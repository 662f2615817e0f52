// Sum of the squares of all elements of a list of contiguous tensors, in float64: the gradient norm's pass over memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

struct SumSquaresTensor {
  const void* data;
  std::int64_t numel;
};

// *out is written, not added to. The same tensors give the same bits whatever the number of threads.
void sum_squares_cpu(const SumSquaresTensor* tensors, std::size_t count, DType dtype, double* out, int num_threads);

// Doubles of device memory that sum_squares_cuda needs for its partial sums.
constexpr int kSumSquaresScratch = 1024;

// out and scratch are device memory here. stream is a cudaStream_t.
void sum_squares_cuda(const SumSquaresTensor* tensors, std::size_t count, DType dtype, double* out, double* scratch,
                      int device, void* stream);

}  // namespace fastft
