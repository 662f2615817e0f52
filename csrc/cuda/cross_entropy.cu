// Softmax cross-entropy, one block per row: an online softmax over the row, then the gradient from a second read. bf16: 6 bytes per
// logit (4 where the row is still in the L2 cache). Formulas: fastft/_C.pyi.
#include <type_traits>

#include "common.cuh"
#include "fastft/cross_entropy.h"

namespace fastft {
namespace {

using namespace cuda;

constexpr float kLog2e = 1.44269504088896341f;

struct Sums {
  float max, sum, weighted, weights;  // max of x, sum of exp(x - max), of weight * x, of weight
};

// exp(x - top); 0 for -inf even where nothing but -inf was seen
__device__ inline float exp_below(float x, float top) { return top == -INFINITY ? (x != x ? x : 0.0f) : exp2f((x - top) * kLog2e); }

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
  __shared__ Sums warps[32];
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

struct RowGrad {
  float max, factor, smooth, target_term;
};

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

template <class T>
__device__ inline void write_zeros(T* grad, std::int64_t n) {
  const bool packs = reinterpret_cast<std::uintptr_t>(grad) % sizeof(T) == 0;
  for_row(grad, n, packs, [&](std::int64_t i, auto width) {
    constexpr int N = decltype(width)::value;
    const float x[N] = {};
    store<N>(grad + i, x);
  });
}

template <class T, bool CAP, bool SMOOTH>
__device__ inline void run_row(const CrossEntropyArgs& a, std::int64_t i) {
  const T* row = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* grad = a.grad != nullptr ? static_cast<T*>(a.grad) + i * a.grad_stride : nullptr;
  const std::int64_t y = a.target[i];
  const bool ignored = y == a.ignore_index;
  const bool counts = !ignored && y >= 0 && y < a.vocab;
  const bool first = threadIdx.x == 0;
  // -1 as unsigned is the largest number, so the minimum leaves the lowest bad row.
  if (first && !counts && !ignored && a.bad_row != nullptr) {
    atomicMin(reinterpret_cast<unsigned long long*>(a.bad_row), static_cast<unsigned long long>(i));
  }
  if (!counts) {
    if (a.lse != nullptr) {
      const Sums s = row_sums<T, CAP, false>(row, a);
      if (first) a.lse[i] = s.sum == 0.0f ? NAN : s.max + logf(s.sum);
    }
    if (first && a.loss != nullptr) a.loss[i] = ignored ? 0.0f : NAN;
    if (grad != nullptr) write_zeros(grad, a.vocab);
    return;
  }

  const float x_y = cap<CAP>(to_float(row[y]) * static_cast<float>(a.logit_scale), static_cast<float>(a.softcap));
  const Sums st = row_sums<T, CAP, SMOOTH>(row, a);  // its barriers also order the read of x_y before a gradient in place
  const float sum = st.sum == 0.0f ? NAN : st.sum;   // every logit is -inf
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
  if (grad == nullptr) return;
  const float outer = token * (a.grad_scale != nullptr ? a.grad_scale[i * a.grad_scale_stride] : 1.0f) *
                      static_cast<float>(a.logit_scale);
  const float of_p = (1.0f - s) * w_y + share * st.weights + 2.0f * z * lse;
  write_grad<T, CAP, SMOOTH>(row, grad, y, {st.max, outer * of_p / sum, outer * share, outer * (1.0f - s) * w_y}, a);
}

template <class T, bool CAP, bool SMOOTH>
__global__ void __launch_bounds__(512) cross_entropy_kernel(CrossEntropyArgs a) {
  for (std::int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) run_row<T, CAP, SMOOTH>(a, i);
}

using Kernel = void (*)(CrossEntropyArgs);

template <class T>
Kernel pick(bool capped, bool smooth) {
  if (capped) return smooth ? cross_entropy_kernel<T, true, true> : cross_entropy_kernel<T, true, false>;
  return smooth ? cross_entropy_kernel<T, false, true> : cross_entropy_kernel<T, false, false>;
}

}  // namespace

void cross_entropy_cuda(const CrossEntropyArgs& a, int device, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const DeviceGuard guard(device);
  if (a.bad_row != nullptr) check(cudaMemsetAsync(a.bad_row, 0xff, sizeof(std::int64_t), s), "cudaMemsetAsync");
  if (a.rows == 0) return;
  const bool capped = a.softcap != 0.0, smooth = a.label_smoothing != 0.0;
  const Kernel kernel = a.dtype == DType::f32 ? pick<float>(capped, smooth) : pick<bf16>(capped, smooth);
  const unsigned blocks = static_cast<unsigned>(a.rows < 2147483647 ? a.rows : 2147483647);
  const unsigned threads = a.vocab >= 4096 ? 512 : 128;
  kernel<<<blocks, threads, 0, s>>>(a);
  check(cudaGetLastError(), "cross-entropy kernel");
}

}  // namespace fastft
