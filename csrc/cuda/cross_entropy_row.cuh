// What both cross-entropy kernels share: online-softmax sums and how they merge, walks over a row, per-row scalars.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "fastft/cross_entropy.h"

namespace fastft::cuda {

constexpr float kLog2e = 1.44269504088896341f;

struct Sums {
  float max, sum, weighted, weights;  // max of x, sum of exp(x - max), of weight * x, of weight
};

// exp(x - top); 0 for -inf even where nothing but -inf was seen
__device__ inline float exp_below(float x, float top) {
  return top == -INFINITY ? (x != x ? x : 0.0f) : exp2f((x - top) * kLog2e);
}

__device__ inline Sums merge(const Sums& a, const Sums& b) {
  const float top = fmaxf(a.max, b.max);
  return {top, a.sum * exp_below(a.max, top) + b.sum * exp_below(b.max, top), a.weighted + b.weighted,
          a.weights + b.weights};
}

__device__ inline Sums shuffle(const Sums& s, int lanes) {
  constexpr unsigned all = 0xffffffffu;
  return {__shfl_xor_sync(all, s.max, lanes), __shfl_xor_sync(all, s.sum, lanes),
          __shfl_xor_sync(all, s.weighted, lanes), __shfl_xor_sync(all, s.weights, lanes)};
}

// In a fixed order, so results repeat bit for bit; every thread gets the result.
__device__ inline Sums block_merge(Sums s) {
  FASTFT_SHARED(Sums, warps, 32);
  for (int lanes = 16; lanes > 0; lanes /= 2) s = merge(s, shuffle(s, lanes));
  __syncthreads();  // the previous row's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  s = warps[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) s = merge(s, warps[w]);
  return s;
}

// Calls body(index, width) over a row: 16-byte packs from the first aligned element, single elements before and after.
template <class T, class Body>
__device__ inline void for_row(const T* row, std::int64_t n, bool packs, Body body) {
  constexpr int width = 16 / sizeof(T);
  std::int64_t head = n, tail = n;
  if (packs) {
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(row) % 16;
    head = past == 0 ? 0 : static_cast<std::int64_t>((16 - past) / sizeof(T));
    head = head < n ? head : n;
    tail = head + (n - head) / width * width;
  }
  for (std::int64_t i = threadIdx.x; i < head; i += blockDim.x) body(i, std::integral_constant<int, 1>{});
  for (std::int64_t i = head + threadIdx.x * width; i < tail; i += static_cast<std::int64_t>(blockDim.x) * width) {
    body(i, std::integral_constant<int, width>{});
  }
  for (std::int64_t i = tail + threadIdx.x; i < n; i += blockDim.x) body(i, std::integral_constant<int, 1>{});
}

template <bool CAP>
__device__ inline float cap(float x, float softcap) {
  return CAP ? softcap * tanhf(x / softcap) : x;
}

template <class T>
__device__ inline void write_zeros(T* grad, std::int64_t n) {
  const bool packs = reinterpret_cast<std::uintptr_t>(grad) % sizeof(T) == 0;
  for_row(grad, n, packs, [&](std::int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const float x[N] = {};
    store<N>(grad + i, x);
  });
}

struct RowGrad {
  float max, factor, smooth, target_term;
};

// What a row is before its logits are read
struct RowTarget {
  std::int64_t y;
  bool ignored, counts;
};

// `first`: the one thread that reports an out-of-range target and writes an uncounted row's loss.
__device__ inline RowTarget row_target(const CrossEntropyArgs& a, std::int64_t i, bool first) {
  const std::int64_t y = a.target[i];
  const bool ignored = y == a.ignore_index, counts = !ignored && y >= 0 && y < a.vocab;
  if (first && !counts) {
    // -1 as unsigned is the largest number, so the minimum leaves the lowest bad row.
    if (!ignored && a.bad_row != nullptr) {
      atomicMin(reinterpret_cast<unsigned long long*>(a.bad_row), static_cast<unsigned long long>(i));
    }
    if (a.loss != nullptr) a.loss[i] = ignored ? 0.0f : NAN;
  }
  return {y, ignored, counts};
}

// From a counted row's sums and its target's logit: writes loss and lse (first thread), returns what the gradient
// needs.
template <bool SMOOTH>
__device__ inline RowGrad finish_row(const CrossEntropyArgs& a, std::int64_t i, std::int64_t y, const Sums& st,
                                     float x_y, bool first) {
  const float sum = st.sum == 0.0f ? NAN : st.sum;  // every logit is -inf
  const float s = static_cast<float>(a.label_smoothing), z = static_cast<float>(a.z_loss);
  const float share = SMOOTH ? s / static_cast<float>(a.vocab) : 0.0f;
  const float log_sum = logf(sum), lse = st.max + log_sum;
  const float w_y = a.class_weight != nullptr ? a.class_weight[y] : 1.0f;
  const float token = a.token_weight != nullptr ? a.token_weight[i * a.token_weight_stride] : 1.0f;
  if (first) {
    if (a.lse != nullptr) a.lse[i] = lse;
    // (max - x) + log_sum, not lse - x: exact also where the loss is tiny beside lse.
    float loss = (1.0f - s) * w_y * ((st.max - x_y) + log_sum) + z * lse * lse;
    if (SMOOTH) loss += share * (st.weights * lse - st.weighted);
    if (a.loss != nullptr) a.loss[i] = token * loss;
  }
  const float outer = token * (a.grad_scale != nullptr ? a.grad_scale[i * a.grad_scale_stride] : 1.0f) *
                      static_cast<float>(a.logit_scale);
  const float of_p = (1.0f - s) * w_y + share * st.weights + 2.0f * z * lse;
  return {st.max, outer * of_p / sum, outer * share, outer * (1.0f - s) * w_y};
}

}  // namespace fastft::cuda
