// Softmax cross-entropy that reads a row twice, one block per row: an online softmax, then the gradient. bf16: 6 bytes
// per logit (4 where the row is still in the L2 cache). Any length, any alignment; a forward alone reads once.
// Formulas: fastft/_C.pyi.
#pragma once

#include "cross_entropy_row.cuh"

namespace fastft::cuda {

template <class T, bool CAP, bool SMOOTH>
__device__ inline Sums row_sums(const T* row, const CrossEntropyArgs& a) {
  const float scale = static_cast<float>(a.logit_scale), softcap = static_cast<float>(a.softcap);
  Sums s{-INFINITY, 0.0f, 0.0f, 0.0f};
  for_row(row, a.vocab, reinterpret_cast<std::uintptr_t>(row) % sizeof(T) == 0, [&](std::int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float x[N];
    load<N>(row + i, x);
    float top = s.max;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x[j] = cap<CAP>(x[j] * scale, softcap);
      top = fmaxf(top, x[j]);  // passes over NaN; the sum below keeps it
    }
    float sum = s.sum * exp_below(s.max, top);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += exp_below(x[j], top);
      if (SMOOTH) {
        const float w = a.class_weight != nullptr ? a.class_weight[i + j] : 1.0f;
        s.weighted = fmaf(w, x[j], s.weighted);
        s.weights += w;
      }
    }
    s.max = top;
    s.sum = sum;
  });
  return block_merge(s);
}

template <class T, bool CAP, bool SMOOTH>
__device__ inline void write_grad(const T* row, T* grad, std::int64_t y, const RowGrad& g, const CrossEntropyArgs& a) {
  const float scale = static_cast<float>(a.logit_scale), softcap = static_cast<float>(a.softcap);
  // Packs need both rows to reach a 16-byte boundary at the same element.
  const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(row) % 16;
  const bool packs = past == reinterpret_cast<std::uintptr_t>(grad) % 16 && past % sizeof(T) == 0;
  for_row(row, a.vocab, packs, [&](std::int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    float x[N];
    load<N>(row + i, x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = cap<CAP>(x[j] * scale, softcap);
      float d = exp_below(c, g.max) * g.factor;
      if (SMOOTH) d -= g.smooth * (a.class_weight != nullptr ? a.class_weight[i + j] : 1.0f);
      if (i + j == y) d -= g.target_term;  // in fp32, before rounding
      if (CAP) d *= 1.0f - (c / softcap) * (c / softcap);
      x[j] = d;
    }
    store<N>(grad + i, x);
  });
}

template <class T, bool CAP, bool SMOOTH>
__device__ inline void two_pass_row(const CrossEntropyArgs& a, std::int64_t i) {
  const T* row = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* grad = a.grad != nullptr ? static_cast<T*>(a.grad) + i * a.grad_stride : nullptr;
  const bool first = threadIdx.x == 0;
  const RowTarget t = row_target(a, i, first);
  if (!t.counts) {
    if (a.lse != nullptr) {
      const Sums s = row_sums<T, CAP, false>(row, a);
      if (first) a.lse[i] = s.sum == 0.0f ? NAN : s.max + logf(s.sum);
    }
    if (grad != nullptr) write_zeros(grad, a.vocab);
    return;
  }
  const float x_y = cap<CAP>(to_float(row[t.y]) * static_cast<float>(a.logit_scale), static_cast<float>(a.softcap));
  // Its barriers also order the read of x_y before a gradient in place.
  const Sums st = row_sums<T, CAP, SMOOTH>(row, a);
  const RowGrad g = finish_row<SMOOTH>(a, i, t.y, st, x_y, first);
  if (grad != nullptr) write_grad<T, CAP, SMOOTH>(row, grad, t.y, g, a);
}

template <class T, bool CAP, bool SMOOTH>
__global__ void __launch_bounds__(512) two_pass_kernel(const __grid_constant__ CrossEntropyArgs a) {
  for (std::int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) two_pass_row<T, CAP, SMOOTH>(a, i);
}

}  // namespace fastft::cuda
