// AdamW over a list of contiguous tensors, one pass over memory: 28 bytes per fp32 parameter, 10 with bf16 parameters
// and 8-bit state.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

// How parameters are rounded. remainder: param (bf16) and a 16-bit number are one fp32 number.
enum class ParamStore : int { nearest = 0, stochastic = 1, remainder = 2 };

// How exp_avg and exp_avg_sq are kept; bf16 and u8 are rounded stochastically. u8: codes in blocks of 256 elements with
// a scale each.
enum class StateStore : int { f32 = 0, bf16 = 1, u8 = 2 };

constexpr std::int64_t kStateBlock = 256;

struct AdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;     // null unless amsgrad; never with u8
  bf16* copy;               // the updated parameter rounded to bf16, or null
  std::int16_t* remainder;  // null unless ParamStore::remainder
  float* exp_avg_scale;     // one per block, null unless u8
  float* exp_avg_sq_scale;
  float* step;  // steps done so far
  std::int64_t numel;
  std::int64_t offset;  // of the first element in the whole that this is a shard of: for the random numbers
};

struct AdamWOptions {
  DType param_dtype;
  DType grad_dtype;
  ParamStore param_store;
  StateStore state_store;
  std::uint64_t seed;
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

constexpr std::size_t kAdamWScratch = 152;  // bytes of device memory that adamw_cuda wants per tensor

// Scalars (steps, lr_ptr, grad_scale, found_inf) are device memory here. stream is a cudaStream_t. scratch: count *
// kAdamWScratch bytes of device memory, 8-byte aligned, for a call that is captured into a CUDA graph, where nothing
// can be allocated; null otherwise.
void adamw_cuda(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& options, int device, void* stream,
                void* scratch);

}  // namespace fastft
