// Softmax cross-entropy on a GPU: picks the kernel with bulk copies where device and call allow it; else the one that
// reads a row once where the row fits into registers and the gradient is wanted; else the one that reads it twice.
#include <map>
#include <mutex>
#include <utility>

#include "cross_entropy_bulk.h"
#include "cross_entropy_resident.cuh"
#include "cross_entropy_two_pass.cuh"

namespace fastft {
namespace {

using namespace cuda;
using Kernel = void (*)(CrossEntropyArgs);

template <class T>
Kernel two_pass(bool capped, bool smooth) {
  if (capped) return smooth ? two_pass_kernel<T, true, true> : two_pass_kernel<T, true, false>;
  return smooth ? two_pass_kernel<T, false, true> : two_pass_kernel<T, false, false>;
}

template <class T, bool CLUSTER>
Kernel resident(bool capped, bool smooth) {
  if (capped) return smooth ? resident_kernel<T, true, true, CLUSTER> : resident_kernel<T, true, false, CLUSTER>;
  return smooth ? resident_kernel<T, false, true, CLUSTER> : resident_kernel<T, false, false, CLUSTER>;
}

template <class T>
Kernel resident(bool capped, bool smooth, bool cluster) {
  return cluster ? resident<T, true>(capped, smooth) : resident<T, false>(capped, smooth);
}

// Whether this device can run clusters of so many blocks of this kernel. 16 is more than every device guarantees. Asked
// once.
bool can_cluster(int device, Kernel kernel, int ranks) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> largest;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(device, reinterpret_cast<const void*>(kernel));
  if (largest.find(key) == largest.end()) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    int most = 1;
    if (major >= 9) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(16);
      config.blockDim = dim3(kResidentThreads);
      if (cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config) != cudaSuccess) {
        (void)cudaGetLastError();  // it stays as the last error otherwise
        most = 8;
      }
    }
    largest[key] = most;
  }
  return ranks <= largest[key];
}

struct Shape {
  int ranks, threads;  // blocks that share a row so that it fits into their registers, 0: it does not; threads of each
};

template <class T>
Shape resident_shape(const CrossEntropyArgs& a, int device, bool capped, bool smooth) {
  constexpr std::int64_t size = sizeof(T), width = 16 / size;
  if (a.grad == nullptr) return {0, 0};  // a forward alone reads once anyway
  // Both rows have to reach a 16-byte boundary at the same element.
  const std::uintptr_t logits = reinterpret_cast<std::uintptr_t>(a.logits),
                       grad = reinterpret_cast<std::uintptr_t>(a.grad);
  if (logits % 16 != grad % 16 || logits % size != 0 || (a.logits_stride - a.grad_stride) * size % 16 != 0)
    return {0, 0};
  const std::int64_t slots = (a.vocab + 2 * (width - 1)) / width * width;  // packs at the ends may be partly outside
  const std::int64_t wanted = (slots + kResidentLogits - 1) / kResidentLogits;  // threads
  if (wanted > 16 * kResidentThreads) return {0, 0};
  int ranks = 1;
  while (ranks < 16 && wanted > ranks * kResidentThreadsWanted) ranks *= 2;
  if (ranks > 1 && !can_cluster(device, resident<T, true>(capped, smooth), ranks))
    ranks /= 2;  // fuller blocks, before giving up
  if (ranks > 1 && !can_cluster(device, resident<T, true>(capped, smooth), ranks)) return {0, 0};
  const std::int64_t threads = ((wanted + ranks - 1) / ranks + 31) / 32 * 32;
  if (threads > kResidentThreads || a.rows > 2147483647 / ranks) return {0, 0};
  return {ranks, static_cast<int>(threads)};
}

template <class T>
void run(const CrossEntropyArgs& a, int device, cudaStream_t stream) {
  const bool capped = a.softcap != 0.0, smooth = a.label_smoothing != 0.0;
  const Shape shape = resident_shape<T>(a, device, capped, smooth);
  if (shape.ranks == 0) {
    const int blocks = static_cast<int>(a.rows < 2147483647 ? a.rows : 2147483647);
    return launch(two_pass<T>(capped, smooth), blocks, a.vocab >= 4096 ? 512 : 128, 1, stream,
                  "cross-entropy kernel, two passes", a);
  }
  launch(resident<T>(capped, smooth, shape.ranks > 1), static_cast<int>(a.rows) * shape.ranks, shape.threads,
         shape.ranks, stream, "cross-entropy kernel, one pass", a);
}

}  // namespace

void cross_entropy_cuda(const CrossEntropyArgs& a, int device, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const DeviceGuard guard(device);
  if (a.bad_row != nullptr) check(cudaMemsetAsync(a.bad_row, 0xff, sizeof(std::int64_t), s), "cudaMemsetAsync");
  if (a.rows == 0 || cross_entropy_bulk(a, device, s)) return;
  a.dtype == DType::f32 ? run<float>(a, device, s) : run<bf16>(a, device, s);
}

}  // namespace fastft
