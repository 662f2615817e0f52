// Runs the CUDA kernels of csrc/cuda on the CPU, unchanged, to test their logic where there is no GPU: indices,
// barriers, shuffles, clusters. It says nothing about speed, memory ordering within a warp, or what nvcc makes of the
// code.
//
// Every CUDA thread is a fiber; the fibers of a block take turns on one OS thread and change over at barriers; the
// blocks of a cluster are OS threads that meet at cluster barriers. A block whose threads do not all reach the same
// barrier is reported, not hung on.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __CUDA_ARCH__ 900
// Thread-local to the OS thread is shared by the block.
#define FASTFT_SHARED(type, name, count)                                                            \
  static thread_local std::aligned_storage_t<sizeof(type) * (count), alignof(type)> name##_storage; \
  type* const name = reinterpret_cast<type*>(&name##_storage)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulate {

struct Waiting {  // a barrier within the block
  unsigned arrived = 0, generation = 0;
};

struct ClusterState {
  std::barrier<> barrier;
  std::vector<char*> anchors;  // of each block's thread-local storage, for distributed shared memory
  explicit ClusterState(int ranks) : barrier(ranks), anchors(static_cast<std::size_t>(ranks)) {}
};

struct Block {
  unsigned threads = 0, done = 0;
  std::size_t current = 0;
  struct Fiber {
    jmp_buf at;
    bool started = false, finished = false;
  };
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  Waiting all, cluster_wait;
  std::vector<Waiting> warps;
  std::vector<double> exchange;  // one 8-byte slot per thread
  std::function<void()> body;
  ClusterState* cluster = nullptr;
  int rank = 0, ranks = 1;
  bool moved = false;  // whether any fiber got on in this round
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor;
inline int compute_capability = 9;  // what cudaDeviceGetAttribute answers

// setjmp and longjmp change over between fibers: swapcontext asks the kernel for the signal mask every time, 30 times
// slower.
inline void yield() {
  if (_setjmp(block->fibers[block->current].at) == 0) _longjmp(block->scheduler, 1);
}

inline void arrive(Waiting& w, unsigned expected, const std::function<void()>& last = nullptr) {
  const unsigned generation = w.generation;
  block->moved = true;
  if (++w.arrived == expected) {
    if (last) last();
    w.arrived = 0;
    ++w.generation;
  }
  while (w.generation == generation) yield();
  block->moved = true;
}

inline void run_fiber() {
  block->body();
  block->fibers[block->current].finished = true;
  block->moved = true;
  ++block->done;
  _longjmp(block->scheduler, 1);
}

// Lets the current fiber run until it yields or ends. A fiber's first run enters its stack through makecontext.
inline void resume(char* stack, std::size_t size) {
  Block::Fiber& fiber = block->fibers[block->current];
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = stack;
  entry.uc_stack.ss_size = size;
  entry.uc_link = nullptr;
  makecontext(&entry, run_fiber, 0);
  setcontext(&entry);
}

}  // namespace emulate

inline thread_local dim3 gridDim, blockDim, blockIdx;
struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(emulate::block->current); }
  } x;
};
inline ThreadIndex threadIdx;

inline void __syncthreads() { emulate::arrive(emulate::block->all, emulate::block->threads); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  emulate::Block& b = *emulate::block;
  const std::size_t self = b.current, warp = self / 32;
  const unsigned members =
      b.threads - static_cast<unsigned>(warp) * 32 < 32 ? b.threads - static_cast<unsigned>(warp) * 32 : 32;
  std::memcpy(&b.exchange[self], &value, sizeof(T));
  emulate::arrive(b.warps[warp], members);
  T got;
  std::memcpy(&got, &b.exchange[self ^ static_cast<std::size_t>(lanes)], sizeof(T));
  emulate::arrive(b.warps[warp], members);  // nobody writes before all have read
  return got;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, lanes);
    if (other > value) value = other;
  }
  return value;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}

inline unsigned long long atomicMin(unsigned long long* p, unsigned long long x) {
  std::atomic_ref<unsigned long long> a(*p);
  unsigned long long seen = a.load();
  while (x < seen && !a.compare_exchange_weak(seen, x)) {
  }
  return seen;
}

inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t n, cudaStream_t) {
  return std::memset(p, value, n), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t n, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, n), cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** p, std::size_t n) {
  return *p = static_cast<T*>(std::malloc(n)), cudaSuccess;
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulate::compute_capability, cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, F*, const cudaLaunchConfig_t*) {
  return *size = 16, cudaSuccess;
}

namespace emulate {

inline void run_block(unsigned index, const dim3& grid, const dim3& shape, const std::function<void()>& body,
                      ClusterState* cluster, int rank, int ranks) {
  Block b;
  b.threads = shape.x;
  b.body = body;
  b.cluster = cluster;
  b.rank = rank;
  b.ranks = ranks;
  b.fibers.resize(shape.x);
  b.warps.resize((shape.x + 31) / 32);
  b.exchange.resize(shape.x + 32);
  block = &b;
  gridDim = grid;
  blockDim = shape;
  blockIdx = dim3(index);
  if (cluster) {
    cluster->anchors[static_cast<std::size_t>(rank)] = &anchor;
    cluster->barrier.arrive_and_wait();
  }
  constexpr std::size_t stack = 32 << 10;
  static thread_local std::vector<char> stacks;  // kept from block to block
  if (stacks.size() < shape.x * stack) stacks.resize(shape.x * stack);
  while (b.done < b.threads) {
    b.moved = false;
    for (b.current = 0; b.current < b.threads; ++b.current) {
      if (!b.fibers[b.current].finished) resume(stacks.data() + b.current * stack, stack);
    }
    if (!b.moved) {
      std::fprintf(stderr, "emulate: block %u hangs: its threads do not all reach the same barrier\n", index);
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace emulate

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  const auto body = [&] { kernel(arguments...); };
  const unsigned ranks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  for (unsigned first = 0; first < config->gridDim.x; first += ranks) {
    if (ranks == 1) {
      emulate::run_block(first, config->gridDim, config->blockDim, body, nullptr, 0, 1);
      continue;
    }
    const auto cluster = std::make_unique<emulate::ClusterState>(static_cast<int>(ranks));
    std::vector<std::thread> blocks;
    for (unsigned r = 0; r < ranks; ++r) {
      blocks.emplace_back(emulate::run_block, first + r, std::cref(config->gridDim), std::cref(config->blockDim),
                          std::cref(body), cluster.get(), static_cast<int>(r), static_cast<int>(ranks));
    }
    for (std::thread& t : blocks) t.join();
  }
  return cudaSuccess;
}
