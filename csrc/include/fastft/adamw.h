// AdamW over a list of contiguous tensors, one pass over memory: 28 bytes per fp32 parameter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

struct AdamWTensor {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;  // null unless amsgrad
  bf16* copy;             // the updated parameter rounded to bf16, or null
  float* step;            // steps done so far
  std::int64_t numel;
};

struct AdamWOptions {
  DType param_dtype;
  DType grad_dtype;
  double lr;
  const float* lr_ptr;  // replaces lr when not null
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;  // true: AdamW, false: L2 added to the gradient
  bool maximize;
  const float* grad_scale;  // g *= *grad_scale, or null
  const float* found_inf;   // when *found_inf != 0 nothing is written, or null
};

void adamw_cpu(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& options, int num_threads);

// Scalars (steps, lr_ptr, grad_scale, found_inf) are device memory here. stream is a cudaStream_t.
void adamw_cuda(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& options, int device, void* stream);

}  // namespace fastft
