// AdamW over a list of tensors: one tiny kernel that turns every tensor's step into its factors, one that updates all
// tensors.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common.cuh"
#include "fastft/adamw.h"
#include "quantized_state.cuh"

namespace fastft {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kVec = 4;                         // fp32: 16-byte accesses
constexpr std::int64_t kChunk = 32 * kThreads;  // elements per block: 229 KB of fp32 traffic, little tail imbalance
static_assert(kChunk % kStateBlock == 0 && kStateBlock == 32 * 2 * kVec, "a warp has a state block, two packs a lane");

struct Factors {
  float grad, decay, l2, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bc2, eps, step_size;
  std::uint32_t random;  // random_base() of this step
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
  f.random = random_base(o.seed, static_cast<std::uint32_t>(step));
  factors[t] = f;
  if (!f.skip) *table[t].tensor.step += 1.0f;
}

// vmax is read and written with amsgrad only. Not a pointer that may be null: its target would have to live in local
// memory.
__device__ inline void update(const Factors& f, float& p, float g, float& m, float& v, bool amsgrad, float& vmax) {
  g *= f.grad;
  if (f.l2 != 0.0f) g = fmaf(f.l2, p, g);
  p *= f.decay;
  const float d = g - m;  // as torch's lerp: from the nearer end
  m = f.one_minus_beta1 < 0.5f ? fmaf(f.one_minus_beta1, d, m) : fmaf(-f.beta1, d, g);
  v = fmaf(f.one_minus_beta2 * g, g, f.beta2 * v);
  if (amsgrad) vmax = vmax > v ? vmax : v;  // NaN in v stays
  p = fmaf(-f.step_size, m / fmaf(sqrtf(amsgrad ? vmax : v), f.inv_sqrt_bc2, f.eps), p);
}

template <int N, class P, ParamStore kStore>
__device__ inline void load_param(const AdamWTensor& t, std::int64_t i, float (&p)[N]) {
  if constexpr (kStore == ParamStore::remainder) {
    bf16 upper[N];
    std::int16_t lower[N];
    load_raw<N>(static_cast<const bf16*>(t.param) + i, upper);
    load_raw<N>(t.remainder + i, lower);
#pragma unroll
    for (int j = 0; j < N; ++j) p[j] = join(upper[j], lower[j]);
  } else {
    load<N>(static_cast<const P*>(t.param) + i, p);
  }
}

// first: random_first() of each element, which only the stochastic store reads
template <int N, class P, ParamStore kStore>
__device__ inline void store_param(const AdamWTensor& t, std::int64_t i, const float (&p)[N],
                                   const std::uint32_t (&first)[N]) {
  bf16 upper[N];
  if constexpr (kStore == ParamStore::remainder) {
    std::int16_t lower[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      upper[j] = upper_half(p[j]);
      lower[j] = lower_half(p[j]);
    }
    store_raw<N>(static_cast<bf16*>(t.param) + i, upper);
    store_raw<N>(t.remainder + i, lower);
  } else if constexpr (kStore == ParamStore::stochastic) {
#pragma unroll
    for (int j = 0; j < N; ++j) upper[j] = round_stochastic(p[j], first[j] >> 16);
    store_raw<N>(static_cast<bf16*>(t.param) + i, upper);
  } else {
    store<N>(static_cast<P*>(t.param) + i, p);
    if (t.copy != nullptr) store<N>(t.copy + i, p);
  }
}

template <int N, class P, class G, ParamStore kStore, class S>
__device__ inline void update_pack(const AdamWTensor& t, const Factors& f, const RandomKeys& keys, std::int64_t i) {
  constexpr bool kHalfState = sizeof(S) == 2;
  float p[N], g[N], m[N], v[N], vmax[N] = {};
  std::uint32_t first[N];
  S *exp_avg = static_cast<S*>(t.exp_avg) + i, *exp_avg_sq = static_cast<S*>(t.exp_avg_sq) + i;
  S* max_exp_avg_sq = t.max_exp_avg_sq != nullptr ? static_cast<S*>(t.max_exp_avg_sq) + i : nullptr;
  load_param<N, P, kStore>(t, i, p);
  load<N>(static_cast<const G*>(t.grad) + i, g);
  load<N>(exp_avg, m);
  load<N>(exp_avg_sq, v);
  if (max_exp_avg_sq != nullptr) load<N>(max_exp_avg_sq, vmax);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    update(f, p[j], g[j], m[j], v[j], max_exp_avg_sq != nullptr, vmax[j]);
    first[j] = kHalfState || kStore == ParamStore::stochastic ? random_first(keys, t.offset + i + j) : 0;
  }
  store_param<N, P, kStore>(t, i, p, first);
  if constexpr (kHalfState) {
    bf16 half_m[N], half_v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      half_m[j] = round_stochastic(m[j], first[j] & 0xffffu);
      half_v[j] = round_stochastic(v[j], random_second(first[j]) >> 16);
    }
    store_raw<N>(exp_avg, half_m);
    store_raw<N>(exp_avg_sq, half_v);
  } else {
    store<N>(exp_avg, m);
    store<N>(exp_avg_sq, v);
  }
  if (max_exp_avg_sq != nullptr) store<N>(max_exp_avg_sq, vmax);
}

// Eight elements of one lane, of a state block that begins at `block` and ends at `end`. Packs: lane l has elements 4 l
// to 4 l + 3 of either half, so that a warp reads 128 neighbours at once; otherwise every 32nd element.
template <bool kPacked>
__device__ inline std::int64_t element(std::int64_t block, int k) {
  const int lane = threadIdx.x % 32;
  return block + (kPacked ? k / kVec * (32 * kVec) + lane * kVec + k % kVec : k * 32 + lane);
}

// One warp, one state block of 256 elements
template <bool kPacked, class P, class G, ParamStore kStore>
__device__ inline void update_block(const AdamWTensor& t, const Factors& f, const RandomKeys& keys, std::int64_t block,
                                    std::int64_t end) {
  constexpr int kEach = kStateBlock / 32, N = kPacked ? kVec : 1;
  const std::int64_t index = block / kStateBlock;
  const float m_scale = t.exp_avg_scale[index], v_scale = t.exp_avg_sq_scale[index];
  std::uint8_t *exp_avg = static_cast<std::uint8_t*>(t.exp_avg), *exp_avg_sq = static_cast<std::uint8_t*>(t.exp_avg_sq);
  float m[kEach], v[kEach];
  std::uint32_t random[kEach];  // for exp_avg below, for exp_avg_sq above
  std::uint32_t m_top = 0, v_top = 0;
  float unused = 0.0f;
#pragma unroll
  for (int k = 0; k < kEach; k += N) {
    const std::int64_t i = element<kPacked>(block, k);
    float p[N], g[N];
    std::uint8_t m_code[N], v_code[N];
    std::uint32_t first[N];
    if (i >= end) {
      m[k] = v[k] = 0.0f;
      random[k] = 0;
      continue;
    }
    load_param<N, P, kStore>(t, i, p);
    load<N>(static_cast<const G*>(t.grad) + i, g);
    load_raw<N>(exp_avg + i, m_code);
    load_raw<N>(exp_avg_sq + i, v_code);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m[k + j] = decode<true>(m_code[j], m_scale);
      v[k + j] = decode<false>(v_code[j], v_scale);
      update(f, p[j], g[j], m[k + j], v[k + j], false, unused);
      first[j] = random_first(keys, t.offset + i + j);
      random[k + j] = (first[j] & 0xffffu) | (random_second(first[j]) & 0xffff0000u);
      m_top = max(m_top, rounded_bits(m[k + j], random[k + j] & 0xffffu));
      v_top = max(v_top, rounded_bits(v[k + j], random[k + j] >> 16));
    }
    store_param<N, P, kStore>(t, i, p, first);
  }
  const BlockScale ms = block_scale(__reduce_max_sync(0xffffffffu, m_top)),
                   vs = block_scale(__reduce_max_sync(0xffffffffu, v_top));
  if (threadIdx.x % 32 == 0) {
    t.exp_avg_scale[index] = ms.scale;
    t.exp_avg_sq_scale[index] = vs.scale;
  }
#pragma unroll
  for (int k = 0; k < kEach; k += N) {
    const std::int64_t i = element<kPacked>(block, k);
    std::uint8_t m_code[N], v_code[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      m_code[j] = ms.broken ? std::uint8_t{0} : encode<true>(m[k + j], random[k + j] & 0xffffu, ms.inverse);
      v_code[j] = vs.broken ? std::uint8_t{0} : encode<false>(v[k + j], random[k + j] >> 16, vs.inverse);
    }
    if (i < end) {
      store_raw<N>(exp_avg + i, m_code);
      store_raw<N>(exp_avg_sq + i, v_code);
    }
  }
}

template <class T>
__device__ inline bool aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kVec * sizeof(T)) == 0;
}

template <class P, class G, class S>
__device__ inline bool aligned(const AdamWTensor& t) {
  return aligned(static_cast<P*>(t.param)) && aligned(static_cast<const G*>(t.grad)) &&
         aligned(static_cast<S*>(t.exp_avg)) && aligned(static_cast<S*>(t.exp_avg_sq)) &&
         aligned(static_cast<S*>(t.max_exp_avg_sq)) && aligned(t.copy) && aligned(t.remainder);
}

// Blocks per multiprocessor: without the number ptxas holds some kernels to fewer registers than they need, and spills.
// 2 blocks with two iterations in flight have 64 KB of fp32 loads on their way, several times what hides the latency of
// HBM.
template <class P, class G, ParamStore kStore, class S>
__global__ void __launch_bounds__(kThreads, 2) adamw_kernel(const Entry* table, int count, const Factors* factors) {
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
  const RandomKeys keys = random_keys(f.random, t.offset + begin);
  const bool packs = aligned<P, G, S>(t);
  if constexpr (sizeof(S) == 1) {
    for (std::int64_t block = begin + threadIdx.x / 32 * kStateBlock; block < end;
         block += kThreads / 32 * kStateBlock) {
      if (packs && end - block >= kStateBlock) update_block<true, P, G, kStore>(t, f, keys, block, end);
      else update_block<false, P, G, kStore>(t, f, keys, block, end);
    }
  } else {
    const std::int64_t scalar_from = packs ? begin + (end - begin) / kVec * kVec : begin;
#pragma unroll 2
    for (std::int64_t i = begin + threadIdx.x * kVec; i < scalar_from; i += kThreads * kVec) {
      update_pack<kVec, P, G, kStore, S>(t, f, keys, i);
    }
    for (std::int64_t i = scalar_from + threadIdx.x; i < end; i += kThreads)
      update_pack<1, P, G, kStore, S>(t, f, keys, i);
  }
}

// Entries as a kernel's parameters: written by the launch itself, with no copy from host memory that a CUDA graph would
// have to keep. 4 KB is what every driver takes as parameters.
constexpr int kPiece = 36;
struct Piece {
  Entry at[kPiece];
  int count;
};
static_assert(sizeof(Piece) + sizeof(Entry*) <= 4096, "a launch takes 4 KB of parameters");

__global__ void fill(const __grid_constant__ Piece piece, Entry* table) {
  const int i = threadIdx.x;
  if (i < piece.count) table[i] = piece.at[i];
}

// The table on the device.
struct Table {
  Entry* entries = nullptr;
  Factors* factors = nullptr;
};
static_assert(sizeof(Entry) + sizeof(Factors) == kAdamWScratch && alignof(Entry) <= 8,
              "what a caller gives per tensor");

// One per (device, stream): work on one stream is ordered, so a new table cannot overtake the kernels that read the old
// one. It is copied only when it changed: then a step is two launches.
struct Kept {
  Table table;
  std::vector<Entry> host;
  std::size_t capacity = 0;
};

Table kept(std::vector<Entry>&& entries, int device, cudaStream_t stream) {
  static std::map<std::pair<int, cudaStream_t>, Kept>
      tables;  // never freed: CUDA may be gone before static destructors run
  Kept& k = tables[{device, stream}];
  const std::size_t bytes = entries.size() * sizeof(Entry);
  if (k.host.size() == entries.size() && std::memcmp(k.host.data(), entries.data(), bytes) == 0) return k.table;
  if (k.capacity < entries.size()) {
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    check(cudaFree(k.table.entries), "cudaFree");
    check(cudaFree(k.table.factors), "cudaFree");
    k = Kept{};
    check(cudaMalloc(&k.table.entries, bytes), "cudaMalloc of the AdamW tensor table");
    check(cudaMalloc(&k.table.factors, entries.size() * sizeof(Factors)), "cudaMalloc of the AdamW factors");
    k.capacity = entries.size();
  }
  k.host.clear();  // if the copy fails, the next call copies again
  // From pageable memory: returns once the source has been staged, so the vector may change after this.
  check(cudaMemcpyAsync(k.table.entries, entries.data(), bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  k.host = std::move(entries);
  return k.table;
}

// In memory of the caller's: under capture, where allocating and waiting are forbidden. Written anew by every replay,
// so the graph needs nothing that lives outside it but the caller's memory.
Table written(const std::vector<Entry>& entries, void* scratch, cudaStream_t stream) {
  Table t;
  t.entries = static_cast<Entry*>(scratch);
  t.factors = reinterpret_cast<Factors*>(t.entries + entries.size());
  for (std::size_t from = 0; from < entries.size(); from += kPiece) {
    Piece piece{};
    piece.count = static_cast<int>(entries.size() - from < kPiece ? entries.size() - from : kPiece);
    std::memcpy(piece.at, entries.data() + from, static_cast<std::size_t>(piece.count) * sizeof(Entry));
    launch(fill, 1, 64, 1, stream, "AdamW table kernel", piece, t.entries + from);
  }
  return t;
}

using Kernel = void (*)(const Entry*, int, const Factors*);

template <class P, class G, ParamStore kStore>
Kernel pick_state(StateStore state) {
  if (state == StateStore::u8) return adamw_kernel<P, G, kStore, std::uint8_t>;
  return state == StateStore::bf16 ? adamw_kernel<P, G, kStore, bf16> : adamw_kernel<P, G, kStore, float>;
}

template <class G>
Kernel pick_param(const AdamWOptions& o) {
  if (o.param_dtype == DType::f32) return pick_state<float, G, ParamStore::nearest>(o.state_store);
  if (o.param_store == ParamStore::stochastic) return pick_state<bf16, G, ParamStore::stochastic>(o.state_store);
  if (o.param_store == ParamStore::remainder) return pick_state<bf16, G, ParamStore::remainder>(o.state_store);
  return pick_state<bf16, G, ParamStore::nearest>(o.state_store);
}

Kernel pick(const AdamWOptions& o) { return o.grad_dtype == DType::f32 ? pick_param<float>(o) : pick_param<bf16>(o); }

}  // namespace

void adamw_cuda(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& options, int device, void* stream,
                void* scratch) {
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
  const Table table = scratch != nullptr ? written(entries, scratch, s) : kept(std::move(entries), device, s);
  launch(prepare, (n + 127) / 128, 128, 1, s, "AdamW prepare kernel", table.entries, n, options, table.factors);
  if (chunks == 0) return;
  launch(pick(options), static_cast<int>(chunks), kThreads, 1, s, "AdamW kernel", table.entries, n, table.factors);
}

}  // namespace fastft
