// What each instruction set provides: loops over one chunk or one row, no OpenMP and no allocation. Everything else
// (validation, threads, float64 per-row scalars) is compiled once, for the baseline CPU.
#pragma once

#include <cstdint>

#include "fastft/adamw.h"
#include "fastft/dtype.h"
#include "fastft/random.h"

namespace fastft::cpu {

struct AdamWChunk {
  void* param;
  const void* grad;
  void* m;
  void* v;
  void* vmax;               // or null
  bf16* copy;               // or null
  std::int16_t* remainder;  // or null
  float* m_scale;           // of the chunk's first block, or null; a chunk begins where a block does
  float* v_scale;
  std::int64_t n;
  std::int64_t position;  // of the first element, for the random numbers
};

struct AdamWScalars {
  float grad_factor;  // grad_scale, negated to maximize
  float decay;        // param is multiplied by this: 1 - lr * weight_decay, or 1
  float l2;           // grad += l2 * param, or 0
  float one_minus_beta1;
  float beta1;
  float beta2;
  float one_minus_beta2;
  float inv_sqrt_bc2;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float step_size;       // lr / (1 - beta1^t)
  std::uint32_t random;  // random_base() of this step
};

using AdamWFn = void (*)(const AdamWChunk&, const AdamWScalars&);

// The stats loop leaves exp(x - reference) of every logit in exps, block by block, each block followed by its
// reference.
constexpr std::int64_t kCeBlock = 2048;
constexpr std::int64_t kCeBlockFloats = kCeBlock + 16;

struct CeLogits {
  const void* row;
  std::int64_t n;
  float scale;          // logit_scale
  float softcap;        // 0: none
  bool smooth;          // also sum the logits, for label smoothing
  const float* weight;  // class weights of that sum, or null
  std::int64_t target;  // class whose logit is wanted, or -1
  float* exps;          // scratch for the gradient (kCeBlockFloats per block), or null when only the loss is wanted
};

struct CeStats {
  float max;            // of the scaled and capped logits; 0 where they are all -inf
  double sum;           // of exp(x - max)
  double weighted_sum;  // of weight * x, when smooth
  float target;         // x of the target, rounded exactly as in the sums: one class alone then has a loss of exactly 0
  float target_tanh;    // tanh(logit / softcap) there, 0 without a cap
};

struct CeGrad {
  void* row;
  double max;
  double factor;  // of exp(x - max)
  float smooth;   // subtracted, times weight
};

using CeStatsFn = CeStats (*)(const CeLogits&);
using CeGradFn = void (*)(const CeLogits&, const CeGrad&);
using SumSquaresFn = double (*)(const void* data, std::int64_t n);
using StreamFn = void (*)(float* p, const float* g, float* m, float* v, std::int64_t n);

// Rows of fastft/decoder.h's element-wise parts. rms_forward returns the row's rstd; rms_backward adds to
// sums_of_weight.
using RmsForwardFn = float (*)(const void* x, const void* residual, const void* weight, void* total, void* y,
                               std::int64_t n, float eps);
using RmsBackwardFn = void (*)(const void* dy, const void* x, const void* weight, float rstd, const void* extra,
                               void* dx, void* y, float* sums_of_weight, std::int64_t n);
using RopeFn = void (*)(void* row, const float* cos, const float* sin, std::int64_t heads, std::int64_t dim,
                        float sign);
using GatedForwardFn = void (*)(const void* gate, const void* up, void* out, std::int64_t n);
using GatedBackwardFn = void (*)(const void* gate, const void* up, const void* dout, void* out, void* dgate, void* dup,
                                 std::int64_t n);

// Keys of a block of attention: multiples of every path's tile, small enough for the L1 cache with their values.
constexpr std::int64_t kAttentionKeys = 60;
// Tokens of a block of queries: about 192 rows, all heads of a group together
static inline std::int64_t attention_queries(std::int64_t ratio) { return ratio < 192 ? 192 / ratio : 1; }

// One document and one group of heads. Pointers are at the document's first token and the group's first head; strides
// are those between tokens.
struct AttentionGroup {
  const void *q, *k, *v;
  std::int64_t q_stride, k_stride, v_stride;
  void* out;
  const void* grad;  // of out, for the backward
  std::int64_t out_stride;
  float* lse;
  std::int64_t lse_stride;
  void *dq, *dk, *dv;  // for the backward
  std::int64_t dq_stride, dk_stride, dv_stride;
  std::int64_t tokens;
  std::int64_t ratio;  // heads of queries
  std::int64_t dim;
  std::int64_t window;  // 0: none
  float scale;
};

// What of a backward one call does: sums of some keys' gradients, or queries' gradients, or both for all of them.
// Begins are multiples of the blocks' sizes, so that every sum is taken in the same order however it is divided.
struct AttentionPart {
  std::int64_t query_begin, query_end, key_begin, key_end;
  bool queries, keys;
};

using AttentionScratchFn = std::int64_t (*)(std::int64_t ratio, std::int64_t dim, std::int64_t keys);  // floats
using AttentionForwardFn = void (*)(const AttentionGroup&, std::int64_t first, std::int64_t count, float* scratch);
using AttentionBackwardFn = void (*)(const AttentionGroup&, const AttentionPart&, float* scratch);

struct Kernels {
  const char* name;
  AdamWFn adamw[4][2][3];  // [fp32, bf16 to nearest, stochastic, with remainder][grad dtype][state]
  CeStatsFn ce_stats[2];
  CeGradFn ce_grad[2];
  SumSquaresFn sum_squares[2];
  StreamFn stream;
  RmsForwardFn rms_forward[2];
  RmsBackwardFn rms_backward[2];
  RopeFn rope[2];
  GatedForwardFn gated_forward[2];
  GatedBackwardFn gated_backward[2];
  AttentionScratchFn attention_scratch;
  AttentionForwardFn attention_forward[2];
  AttentionBackwardFn attention_backward[2];
};

extern const Kernels kernels_scalar;
#ifdef FASTFT_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The table in use. Throws std::invalid_argument when FASTFT_CPU names something this CPU cannot run.
const Kernels& kernels();

struct Features {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16;
};
Features features();

int thread_count(int requested);

// The memory traffic of one fp32 AdamW step (4 reads, 3 writes of n floats) with almost no arithmetic: the limit that
// benchmarks/adamw.py compares with.
void stream_4r3w(float* p, const float* g, float* m, float* v, std::int64_t n, int num_threads);

}  // namespace fastft::cpu
