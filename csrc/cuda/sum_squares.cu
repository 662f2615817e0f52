// Sum of squares over a list of tensors: every block adds its share to its own partial sum, in float64; a last block
// adds those in order. The tensor list travels as a kernel argument, so there is nothing to upload and a captured graph
// keeps it.
#include "common.cuh"
#include "fastft/sum_squares.h"

namespace fastft {
namespace {

using namespace cuda;

constexpr int kThreads = 512;
constexpr int kBlocks = kSumSquaresScratch;
constexpr std::int64_t kChunk = 65536;
constexpr int kPerLaunch = 128;  // kernel arguments end at 4 KiB

struct List {
  SumSquaresTensor tensor[kPerLaunch];
  int first_chunk[kPerLaunch];  // chunks before this tensor
  int count, chunks;
};

// In a fixed order, so results repeat bit for bit; thread 0 gets the result.
__device__ inline double block_sum(double x) {
  FASTFT_SHARED(double, warps, kThreads / 32);
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  }
  return total;
}

template <class T>
__device__ inline double chunk_sum(const T* p, std::int64_t n) {
  constexpr int width = 16 / sizeof(T);
  double sum = 0.0;
  std::int64_t from = 0;
  if (reinterpret_cast<std::uintptr_t>(p) % 16 == 0) {
    from = n / width * width;
#pragma unroll 4
    for (std::int64_t i = static_cast<std::int64_t>(threadIdx.x) * width; i < from; i += kThreads * width) {
      float x[width];
      load<width>(p + i, x);
#pragma unroll
      for (int j = 0; j < width; ++j) sum = fma(static_cast<double>(x[j]), static_cast<double>(x[j]), sum);
    }
  }
  for (std::int64_t i = from + threadIdx.x; i < n; i += kThreads) {
    const double x = to_float(p[i]);
    sum = fma(x, x, sum);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    partial_sums(const __grid_constant__ List list, double* scratch, bool first) {
  double sum = 0.0;
  int t = 0;
  for (int c = static_cast<int>(blockIdx.x); c < list.chunks; c += kBlocks) {
    while (t + 1 < list.count && list.first_chunk[t + 1] <= c) ++t;
    const std::int64_t at = static_cast<std::int64_t>(c - list.first_chunk[t]) * kChunk;
    const std::int64_t left = list.tensor[t].numel - at;
    sum += chunk_sum(static_cast<const T*>(list.tensor[t].data) + at, left < kChunk ? left : kChunk);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) scratch[blockIdx.x] = first ? sum : scratch[blockIdx.x] + sum;
}

__global__ void __launch_bounds__(kThreads) last_sum(const double* scratch, double* out) {
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < kBlocks; i += kThreads) sum += scratch[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace

void sum_squares_cuda(const SumSquaresTensor* tensors, std::size_t count, DType dtype, double* out, double* scratch,
                      int device, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const DeviceGuard guard(device);
  const auto kernel = dtype == DType::f32 ? partial_sums<float> : partial_sums<bf16>;
  std::size_t next = 0;
  do {  // once also for an empty list: scratch has to be written
    List list{};
    const bool first = next == 0;
    while (next < count && list.count < kPerLaunch) {
      const std::int64_t chunks = (tensors[next].numel + kChunk - 1) / kChunk;
      if (chunks + list.chunks > 2147483647)
        throw std::invalid_argument("sum_squares: more than 1.4e14 elements in one call");
      list.tensor[list.count] = tensors[next];
      list.first_chunk[list.count++] = list.chunks;
      list.chunks += static_cast<int>(chunks);
      ++next;
    }
    launch(kernel, kBlocks, kThreads, 1, s, "sum of squares kernel", list, scratch, first);
  } while (next < count);
  launch(last_sum, 1, kThreads, 1, s, "sum of squares, last kernel", scratch, out);
}

}  // namespace fastft
