// AdamW over a list of tensors: one tiny kernel that turns every tensor's step into its factors, one that updates all tensors.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common.cuh"
#include "fastft/adamw.h"

namespace fastft {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kVec = 4;                       // fp32: 16-byte accesses
constexpr std::int64_t kChunk = 32 * kThreads;  // elements per block: 229 KB of traffic, little tail imbalance

struct Factors {
  float grad, decay, l2, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bc2, eps, step_size;
  int skip;
};

// One entry per tensor, in device memory
struct Entry {
  AdamWTensor tensor;
  std::int64_t first_chunk;  // chunks of the tensors before this one
};

// Reads the scalars on the device, so that no step waits for the host. Nothing reads step after this, so it is
// incremented here. Powers in float64: 1 - beta2^t at t = 1 loses 4 digits in float32.
__global__ void prepare(const Entry* table, int count, AdamWOptions o, Factors* factors) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= count) return;
  Factors f;
  f.skip = o.found_inf != nullptr && *o.found_inf != 0.0f;
  const double lr = o.lr_ptr != nullptr ? static_cast<double>(*o.lr_ptr) : o.lr;
  const double step = static_cast<double>(*table[t].tensor.step) + 1.0;
  const float scale = o.grad_scale != nullptr ? *o.grad_scale : 1.0f;
  f.grad = o.maximize ? -scale : scale;
  f.decay = o.decoupled ? static_cast<float>(1.0 - lr * o.weight_decay) : 1.0f;
  f.l2 = o.decoupled ? 0.0f : static_cast<float>(o.weight_decay);
  f.beta1 = static_cast<float>(o.beta1);
  f.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  f.beta2 = static_cast<float>(o.beta2);
  f.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  f.inv_sqrt_bc2 = static_cast<float>(1.0 / sqrt(1.0 - pow(o.beta2, step)));
  f.eps = static_cast<float>(o.eps);
  f.step_size = static_cast<float>(lr / (1.0 - pow(o.beta1, step)));
  factors[t] = f;
  if (!f.skip) *table[t].tensor.step += 1.0f;
}

__device__ inline void update(const Factors& f, float& p, float g, float& m, float& v, float* vmax) {
  g *= f.grad;
  if (f.l2 != 0.0f) g = fmaf(f.l2, p, g);
  p *= f.decay;
  const float d = g - m;  // as torch's lerp: from the nearer end
  m = f.one_minus_beta1 < 0.5f ? fmaf(f.one_minus_beta1, d, m) : fmaf(-f.beta1, d, g);
  v = fmaf(f.one_minus_beta2 * g, g, f.beta2 * v);
  float second = v;
  if (vmax != nullptr) {
    second = *vmax > v ? *vmax : v;  // NaN in v stays
    *vmax = second;
  }
  p = fmaf(-f.step_size, m / fmaf(sqrtf(second), f.inv_sqrt_bc2, f.eps), p);
}

template <int N, class P, class G>
__device__ inline void update_pack(const AdamWTensor& t, const Factors& f, std::int64_t i) {
  float p[N], g[N], m[N], v[N], vmax[N];
  P* param = static_cast<P*>(t.param) + i;
  load<N>(param, p);
  load<N>(static_cast<const G*>(t.grad) + i, g);
  load<N>(t.exp_avg + i, m);
  load<N>(t.exp_avg_sq + i, v);
  if (t.max_exp_avg_sq != nullptr) load<N>(t.max_exp_avg_sq + i, vmax);
#pragma unroll
  for (int j = 0; j < N; ++j) update(f, p[j], g[j], m[j], v[j], t.max_exp_avg_sq != nullptr ? &vmax[j] : nullptr);
  store<N>(param, p);
  store<N>(t.exp_avg + i, m);
  store<N>(t.exp_avg_sq + i, v);
  if (t.max_exp_avg_sq != nullptr) store<N>(t.max_exp_avg_sq + i, vmax);
  if (t.copy != nullptr) store<N>(t.copy + i, p);
}

template <class T>
__device__ inline bool aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kVec * sizeof(T)) == 0;
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const Entry* table, int count, const Factors* factors) {
  const std::int64_t chunk = blockIdx.x;
  int low = 0, high = count - 1;  // the last tensor whose first chunk is not past ours
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].first_chunk <= chunk) low = middle;
    else high = middle - 1;
  }
  const Factors f = factors[low];
  if (f.skip) return;
  const AdamWTensor t = table[low].tensor;
  const std::int64_t begin = (chunk - table[low].first_chunk) * kChunk;
  const std::int64_t end = begin + kChunk < t.numel ? begin + kChunk : t.numel;
  std::int64_t scalar_from = begin;
  if (aligned(static_cast<P*>(t.param)) && aligned(static_cast<const G*>(t.grad)) && aligned(t.exp_avg) &&
      aligned(t.exp_avg_sq) && aligned(t.max_exp_avg_sq) && aligned(t.copy)) {
    scalar_from = begin + (end - begin) / kVec * kVec;
#pragma unroll 2
    for (std::int64_t i = begin + threadIdx.x * kVec; i < scalar_from; i += kThreads * kVec) {
      update_pack<kVec, P, G>(t, f, i);
    }
  }
  for (std::int64_t i = scalar_from + threadIdx.x; i < end; i += kThreads) update_pack<1, P, G>(t, f, i);
}

// The table on the device, one per (device, stream): work on one stream is ordered, so a new table cannot overtake the kernels
// that read the old one. It is copied only when it changed: then a step is two launches, and it can be captured into a
// CUDA graph after one eager step with the same tensors. A changed table under capture is a copy from pageable memory, which
// the capture refuses or, worse, replays from freed memory; the caller has to warm up first.
struct Table {
  std::vector<Entry> host;
  Entry* entries = nullptr;
  Factors* factors = nullptr;
  std::size_t capacity = 0;
};

const Table& upload(std::vector<Entry>&& entries, int device, cudaStream_t stream) {
  static std::map<std::pair<int, cudaStream_t>, Table> tables;  // never freed: CUDA may be gone before static destructors run
  Table& t = tables[{device, stream}];
  const std::size_t bytes = entries.size() * sizeof(Entry);
  if (t.host.size() == entries.size() && std::memcmp(t.host.data(), entries.data(), bytes) == 0) return t;
  if (t.capacity < entries.size()) {
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    check(cudaFree(t.entries), "cudaFree");
    check(cudaFree(t.factors), "cudaFree");
    t = Table{};
    check(cudaMalloc(&t.entries, bytes), "cudaMalloc of the AdamW tensor table");
    check(cudaMalloc(&t.factors, entries.size() * sizeof(Factors)), "cudaMalloc of the AdamW factors");
    t.capacity = entries.size();
  }
  t.host.clear();  // if the copy fails, the next call copies again
  // From pageable memory: returns once the source has been staged, so the vector may change after this.
  check(cudaMemcpyAsync(t.entries, entries.data(), bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  t.host = std::move(entries);
  return t;
}

using Kernel = void (*)(const Entry*, int, const Factors*);

Kernel pick(DType param, DType grad) {
  if (param == DType::f32) return grad == DType::f32 ? adamw_kernel<float, float> : adamw_kernel<float, bf16>;
  return grad == DType::f32 ? adamw_kernel<bf16, float> : adamw_kernel<bf16, bf16>;
}

}  // namespace

void adamw_cuda(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& options, int device, void* stream) {
  if (count == 0) return;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const DeviceGuard guard(device);
  static std::mutex mutex;  // two threads may step two optimizers on one stream
  const std::lock_guard<std::mutex> lock(mutex);

  std::vector<Entry> entries(count);
  std::int64_t chunks = 0;
  for (std::size_t i = 0; i < count; ++i) {
    entries[i].tensor = tensors[i];
    entries[i].first_chunk = chunks;
    chunks += (tensors[i].numel + kChunk - 1) / kChunk;
  }
  if (chunks > 2147483647) throw std::invalid_argument("AdamW: more than 1.7e13 elements in one call");
  const int n = static_cast<int>(count);
  const Table& table = upload(std::move(entries), device, s);
  prepare<<<(n + 127) / 128, 128, 0, s>>>(table.entries, n, options, table.factors);
  check(cudaGetLastError(), "AdamW prepare kernel");
  if (chunks == 0) return;
  pick(options.param_dtype, options.grad_dtype)<<<static_cast<unsigned>(chunks), kThreads, 0, s>>>(table.entries, n, table.factors);
  check(cudaGetLastError(), "AdamW kernel");
}

}  // namespace fastft
