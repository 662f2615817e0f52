// Softmax cross-entropy: loss, logsumexp and gradient of every row in one call. Formulas: fastft/_C.pyi.
#pragma once

#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

struct CrossEntropyArgs {
  const void* logits;  // (rows, vocab), rows logits_stride elements apart
  DType dtype;         // of logits and grad
  std::int64_t rows;
  std::int64_t vocab;
  std::int64_t logits_stride;
  const std::int64_t* target;  // (rows,)
  const float* class_weight;   // (vocab,) or null
  const float* token_weight;   // (rows,), or one scalar when the stride is 0, or null
  std::int64_t token_weight_stride;
  std::int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  double logit_scale;
  float* loss;  // (rows,) or null
  float* lse;   // (rows,) or null
  void* grad;   // (rows, vocab), rows grad_stride apart; may be logits itself; null: forward only
  std::int64_t grad_stride;
  const float* grad_scale;  // (rows,), or one scalar when the stride is 0, or null
  std::int64_t grad_scale_stride;
  std::int64_t* bad_row;  // lowest row with an out-of-range target, else -1; or null
  int variant;            // of the CUDA kernel, for benchmarks and tests; 0: chosen by device and call
};

// Variants: the kernels that need no sm_90; 8 or 16: the one for sm_90 with so many warps, plus 100 * the fewest blocks
// a row. The older kernels step in where another one cannot do a call.
constexpr int kCrossEntropyOlder = 1;

void cross_entropy_cpu(const CrossEntropyArgs& args, int num_threads);

// target, weights, scales, outputs and bad_row are device memory here. stream is a cudaStream_t.
void cross_entropy_cuda(const CrossEntropyArgs& args, int device, void* stream);

}  // namespace fastft
