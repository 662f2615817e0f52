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

struct Kernels {
  const char* name;
  AdamWFn adamw[4][2][3];  // [fp32, bf16 to nearest, stochastic, with remainder][grad dtype][state]
  CeStatsFn ce_stats[2];
  CeGradFn ce_grad[2];
  SumSquaresFn sum_squares[2];
  StreamFn stream;
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
