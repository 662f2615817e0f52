// What a decoder layer does between its matrix products, on the CPU: RMS norm, rotary embedding, gated MLP, causal
// attention within documents. fp32 or bf16 in memory, fp32 arithmetic, rounded to nearest even. The same input gives
// the same bits whatever the number of threads. A result may lie where an operand of its own elements does.
#pragma once

#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

struct RmsForward {
  const void* x;         // (rows, columns)
  const void* residual;  // added to x first, or null
  const void* weight;    // (columns)
  void* total;           // x + residual, with a residual
  void* y;               // total * rstd * weight
  float* rstd;           // (rows) 1 / sqrt(mean(total^2) + eps)
  std::int64_t rows;
  std::int64_t columns;
  double eps;
  DType dtype;
};
void rms_forward_cpu(const RmsForward& a, int num_threads);

struct RmsBackward {
  const void* dy;
  const void* x;
  const void* weight;
  const float* rstd;
  const void* extra;  // added to dx, or null
  void* dx;
  void* y;         // the forward's result again, or null
  float* dweight;  // (columns)
  std::int64_t rows;
  std::int64_t columns;
  DType dtype;
};
void rms_backward_cpu(const RmsBackward& a, int num_threads);

// Rotates pairs (x_j, x_{j + dim/2}) of the first `heads` heads of each row, in place.
struct Rope {
  void* rows;        // (count, stride), heads one after the other
  const float* cos;  // (period, table_stride), of which the first dim / 2 are read; row i takes i % period
  const float* sin;
  std::int64_t count;
  std::int64_t stride;
  std::int64_t heads;
  std::int64_t dim;
  std::int64_t period;
  std::int64_t table_stride;
  bool back;  // the other way round
  DType dtype;
};
void rope_cpu(const Rope& a, int num_threads);

struct GatedForward {
  const void* gate;  // (rows, width), rows `stride` apart
  const void* up;
  void* out;  // (rows, width) contiguous: silu(gate) * up
  std::int64_t rows;
  std::int64_t width;
  std::int64_t stride;
  DType dtype;
};
void gated_forward_cpu(const GatedForward& a, int num_threads);

struct GatedBackward {
  const void* gate;  // as in the forward
  const void* up;
  const void* dout;  // (rows, width) contiguous
  void* out;         // the forward's result again, contiguous, or null
  void* dgate;       // as gate
  void* dup;
  std::int64_t rows;
  std::int64_t width;
  std::int64_t stride;
  DType dtype;
};
void gated_backward_cpu(const GatedBackward& a, int num_threads);

// Each token attends to itself and those before it in its document, or to the last `window` of them.
struct Attention {
  const void* q;  // token t at q + t * q_stride, its heads one after the other
  const void* k;  // `groups` heads: head h attends to keys of head h / (heads / groups)
  const void* v;
  std::int64_t q_stride, k_stride, v_stride;
  const std::int32_t* bounds;  // (documents + 1): where documents begin, and the end of the last
  std::int64_t documents;
  std::int64_t heads;
  std::int64_t groups;
  std::int64_t dim;
  double scale;
  std::int64_t window;  // 0: none
  DType dtype;
  void* out;   // (tokens, heads, dim) contiguous
  float* lse;  // (tokens, heads): logsumexp of each row of scaled products
};
void attention_forward_cpu(const Attention& a, int num_threads);

struct AttentionGradients {
  const void* grad;  // of out, as out
  void* dq;
  void* dk;
  void* dv;
  std::int64_t dq_stride, dk_stride, dv_stride;
};
// `a` with what the forward wrote
void attention_backward_cpu(const Attention& a, const AttentionGradients& g, int num_threads);

}  // namespace fastft
