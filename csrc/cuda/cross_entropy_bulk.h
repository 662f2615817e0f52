// The cross-entropy kernel for sm_90 and later, for cross_entropy.cu. A file of its own: it compiles beside the others,
// and csrc/tests emulates the two kinds of kernel in two ways.
#pragma once

#include <cuda_runtime.h>

#include "fastft/cross_entropy.h"

namespace fastft::cuda {

// Starts the kernel on a stream and returns true; false where this device or this call needs another one: before sm_90,
// rows beyond 1.25 MB, grad of another alignment than logits, logit_scale <= 0, label smoothing with class weights or
// with a softcap. Throws what a failed launch reports.
bool cross_entropy_bulk(const CrossEntropyArgs& a, int device, cudaStream_t stream);

}  // namespace fastft::cuda
