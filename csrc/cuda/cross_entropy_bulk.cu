// Whether cross_entropy_bulk.cuh can do a call, how many warps and blocks it gives to a row, and its launch.
#include "cross_entropy_bulk.h"

#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "common.cuh"
#include "cross_entropy_bulk.cuh"

namespace fastft::cuda {
namespace {

// Shorter rows leave too little to do between two exchanges.
constexpr std::int64_t kLeastRowBytes = 8192;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

template <class T>
bool fits(const CrossEntropyArgs& a, int device) {
  constexpr std::int64_t size = sizeof(T);
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return false;
  if (a.variant == 0 && a.vocab * size < kLeastRowBytes) return false;
  if (a.vocab > (1 << 24) || !(a.logit_scale > 0.0) || !std::isfinite(a.logit_scale)) return false;
  if (a.label_smoothing != 0.0 && (a.class_weight != nullptr || a.softcap != 0.0)) return false;
  const std::uintptr_t logits = reinterpret_cast<std::uintptr_t>(a.logits),
                       grad = reinterpret_cast<std::uintptr_t>(a.grad);
  if (logits % size != 0) return false;
  // Both rows have to reach a 16-byte boundary at the same element.
  return a.grad == nullptr || (logits % 16 == grad % 16 && (a.logits_stride - a.grad_stride) * size % 16 == 0);
}

bulk::Args bulk_args(const CrossEntropyArgs& a) {
  bulk::Args b{};
  b.logits = a.logits;
  b.grad = a.grad;
  b.target = a.target;
  b.loss = a.loss;
  b.lse = a.lse;
  b.class_weight = a.class_weight;
  b.token_weight = a.token_weight;
  b.grad_scale = a.grad_scale;
  b.bad_row = a.bad_row;
  b.rows = a.rows;
  b.logits_stride = a.logits_stride;
  b.grad_stride = a.grad_stride;
  b.ignore_index = a.ignore_index;
  b.token_weight_stride = a.token_weight_stride;
  b.grad_scale_stride = a.grad_scale_stride;
  b.vocab = static_cast<int>(a.vocab);
  b.label_smoothing = static_cast<float>(a.label_smoothing);
  b.z_loss = static_cast<float>(a.z_loss);
  b.softcap = static_cast<float>(a.softcap);
  b.logit_scale = static_cast<float>(a.logit_scale);
  return b;
}

cudaLaunchConfig_t configuration(int ranks, int threads, int shared_bytes, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ranks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// How many clusters of so many blocks are on this device at once; 0: it cannot run them. Asked once a device; the
// kernel's attributes, set beside it, stay too.
template <class S, class Kernel>
int resident_clusters(Kernel kernel, int ranks, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, reinterpret_cast<const void*>(kernel), ranks);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int clusters = 0;
  if (attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) >= S::shared_bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes),
          "cudaFuncSetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "cudaFuncSetAttribute");
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration(ranks, S::threads, S::shared_bytes, cluster);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      (void)cudaGetLastError();  // it stays as the last error otherwise
      clusters = 0;
    }
  }
  known[key] = clusters;
  return clusters;
}

template <class T, int WARPS, bool SMOOTH, bool CAP>
bool start(bulk::Args b, int least, int device, cudaStream_t stream) {
  using S = bulk::Shape<WARPS, SMOOTH>;
  const auto kernel = bulk::bulk_kernel<T, WARPS, SMOOTH, CAP>;
  const int ranks = bulk::plan<S>(b, sizeof(T), least);
  if (ranks == 0) return false;
  const std::int64_t clusters = resident_clusters<S>(kernel, ranks, device);
  if (clusters == 0) return false;
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config = configuration(ranks, S::threads, S::shared_bytes, cluster);
  config.gridDim = dim3(static_cast<unsigned>((clusters < b.rows ? clusters : b.rows) * ranks));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, b), "cross-entropy kernel, bulk copies");
  return true;
}

template <class T, bool SMOOTH, bool CAP>
bool start(const bulk::Args& b, int variant, int device, cudaStream_t stream) {
  const int warps = variant % 100, least = variant < 100 ? 1 : variant / 100;
  if (warps != 16 && start<T, 8, SMOOTH, CAP>(b, least, device, stream)) return true;
  return warps != 8 && start<T, 16, SMOOTH, CAP>(b, least, device, stream);
}

template <class T>
bool start(const CrossEntropyArgs& a, int device, cudaStream_t stream) {
  if (!fits<T>(a, device)) return false;
  const bulk::Args b = bulk_args(a);
  if (a.softcap != 0.0) return start<T, false, true>(b, a.variant, device, stream);
  if (a.label_smoothing != 0.0) return start<T, true, false>(b, a.variant, device, stream);
  return start<T, false, false>(b, a.variant, device, stream);
}

}  // namespace

bool cross_entropy_bulk(const CrossEntropyArgs& a, int device, cudaStream_t stream) {
  if (a.variant == kCrossEntropyOlder) return false;
  return a.dtype == DType::f32 ? start<float>(a, device, stream) : start<bf16>(a, device, stream);
}

}  // namespace fastft::cuda
