// Runs kernels that use csrc/cuda/bulk_copy.cuh on a CPU, unchanged, with the functions of that file: every GPU thread
// is a fiber, some nap at random; bulk copies and what is sent to other blocks happen late and in random order. So a
// missing wait, a slot used too early, a wrong parity or a block that ends too early gives a wrong answer, a message or
// a reported deadlock. Memory itself is in order: a missing fence is not seen, nor is anything about speed.
//
// cuda_runtime.h beside this emulates the other kernels: it is closer to CUDA, and lacks what happens late.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FASTFT_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct uint4 {
  std::uint32_t x, y, z, w;
};

namespace fastft::cuda::bulk {

struct Barrier {  // in the 8 bytes of an mbarrier
  std::int32_t bytes;
  std::int16_t pending;
  std::uint8_t arrivals, phase;
};
static_assert(sizeof(Barrier) == 8);

struct Store {
  bool read = false, written = false;
};

struct Fiber {
  jmp_buf at;
  bool started = false, finished = false;
  int block = 0, thread = 0;  // of the cluster, of the block
  int asleep = 0;             // rounds
  std::vector<std::shared_ptr<Store>> stores;
};

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  std::uint32_t word[32];
};

// A cluster at work. Something late returns true once it is over.
struct Machine {
  int ranks = 1, cluster = 0, clusters = 1, threads = 0;
  std::vector<std::vector<unsigned char>> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> running;  // threads of each block
  std::size_t cluster_arrived = 0;
  unsigned cluster_generation = 0;
  std::vector<std::function<bool()>> late;
  std::mt19937 random;
  Fiber* now = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
};
inline Machine* machine = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulate: %s\n", what);
  std::abort();
}

// setjmp and longjmp change over between fibers, as in cuda_runtime.h: swapcontext is 30 times slower.
inline void yield() {
  if (_setjmp(machine->now->at) == 0) _longjmp(machine->scheduler, 1);
}
inline void run_fiber() {
  machine->body();
  machine->now->finished = true;
  --machine->running[static_cast<std::size_t>(machine->now->block)];
  _longjmp(machine->scheduler, 1);
}
inline void resume(Fiber& fiber, char* stack, std::size_t size) {
  machine->now = &fiber;
  if (_setjmp(machine->scheduler) != 0) return;
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

// ---- threads, warps, the cluster
inline int thread_index() { return machine->now->thread; }
inline int cluster_rank() { return machine->now->block; }
inline int cluster_size() { return machine->ranks; }
inline int block_index() { return machine->cluster * machine->ranks + machine->now->block; }
inline int block_count() { return machine->clusters * machine->ranks; }
inline unsigned char* shared_of(int block) {
  unsigned char* p = machine->shared[static_cast<std::size_t>(block)].data();
  return p + (128 - reinterpret_cast<std::uintptr_t>(p) % 128) % 128;
}
inline unsigned char* shared_memory() { return shared_of(machine->now->block); }
inline Warp& my_warp() {
  return machine->warps[static_cast<std::size_t>((machine->now->block * machine->threads + machine->now->thread) / 32)];
}
inline void sync_warp() {
  Warp& w = my_warp();
  const unsigned generation = w.generation;
  if (++w.arrived == 32) {
    w.arrived = 0;
    ++w.generation;
    return;
  }
  while (w.generation == generation) yield();
}
template <class T>
T exchange_lane(T x, int lane) {
  static_assert(sizeof(T) == 4);
  Warp& w = my_warp();
  std::memcpy(&w.word[machine->now->thread % 32], &x, 4);
  sync_warp();
  T y;
  std::memcpy(&y, &w.word[lane], 4);
  sync_warp();
  return y;
}
inline float shuffle_xor(float x, int lanes) { return exchange_lane(x, machine->now->thread % 32 ^ lanes); }
inline int shuffle(int x, int lane) { return exchange_lane(x, lane); }
inline void sync_cluster() {
  const unsigned generation = machine->cluster_generation;
  if (++machine->cluster_arrived == machine->fibers.size()) {
    machine->cluster_arrived = 0;
    ++machine->cluster_generation;
    return;
  }
  while (machine->cluster_generation == generation) yield();
}
inline void atomic_min(std::int64_t* p, std::int64_t x) {
  if (static_cast<std::uint64_t>(x) < static_cast<std::uint64_t>(*p)) *p = x;
}

// ---- barriers
inline Barrier& barrier(std::uint64_t* b) { return *reinterpret_cast<Barrier*>(b); }
inline void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals than a barrier expects");
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.arrivals;
    b.phase ^= 1;
  }
}
inline void barrier_init(std::uint64_t* b, int arrivals) {
  barrier(b) = {0, static_cast<std::int16_t>(arrivals), static_cast<std::uint8_t>(arrivals), 0};
}
inline void barrier_arrive(std::uint64_t* b) {
  --barrier(b).pending;
  settle(barrier(b));
}
inline void barrier_expect(std::uint64_t* b, int bytes) {
  barrier(b).bytes += bytes;
  --barrier(b).pending;
  settle(barrier(b));
}
inline void barrier_wait(std::uint64_t* b, unsigned parity) {
  while (barrier(b).phase == parity) yield();
}
inline void barrier_wait_cluster(std::uint64_t* b, unsigned parity) { barrier_wait(b, parity); }
inline void bytes_came(int block, std::uint64_t* b, int bytes) {
  if (machine->running[static_cast<std::size_t>(block)] == 0) fail("bytes came to a block that has ended");
  barrier(b).bytes -= bytes;
  settle(barrier(b));
}

// ---- copies
inline void check_bulk(const void* p, const void* q, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16 || reinterpret_cast<std::uintptr_t>(q) % 16 || bytes % 16 || bytes <= 0)
    fail("a bulk copy is not in whole packs of 16 bytes");
}
inline void bulk_load(void* to, const void* from, int bytes, std::uint64_t* arrived) {
  check_bulk(to, from, bytes);
  std::memset(to, 0x7f, static_cast<std::size_t>(bytes));  // what is there before: NaN in bf16, huge in fp32
  const int block = machine->now->block;
  machine->late.push_back([=] {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    bytes_came(block, arrived, bytes);
    return true;
  });
}
inline void bulk_store(void* to, const void* from, int bytes) {  // reads at some time, writes at a later one
  check_bulk(to, from, bytes);
  const auto store = std::make_shared<Store>();
  const auto data = std::make_shared<std::vector<unsigned char>>(bytes);
  machine->now->stores.push_back(store);
  machine->late.push_back([=] {
    if (!store->read) {
      std::memcpy(data->data(), from, data->size());
      store->read = true;
      return false;
    }
    std::memcpy(to, data->data(), data->size());
    return store->written = true;
  });
}
template <int N>
void bulk_stores_read() {
  const auto& s = machine->now->stores;
  for (std::size_t k = 0; k + N < s.size(); ++k) {
    while (!s[k]->read) yield();
  }
}
inline void bulk_stores_done() {
  for (const auto& s : machine->now->stores) {
    while (!s->written) yield();
  }
}
inline void fence_async() {}

template <class T>
T* address_of_rank(T* p, int rank) {
  return reinterpret_cast<T*>(shared_of(rank) + (reinterpret_cast<unsigned char*>(p) - shared_memory()));
}
inline void send_all(int rank, float* to, std::vector<float> x, std::uint64_t* b) {
  float* const there = address_of_rank(to, rank);
  std::uint64_t* const their_barrier = address_of_rank(b, rank);
  machine->late.push_back([=] {
    std::memcpy(there, x.data(), x.size() * 4);
    bytes_came(rank, their_barrier, static_cast<int>(x.size() * 4));
    return true;
  });
}
inline void send(int rank, float* to, float x, std::uint64_t* b) { send_all(rank, to, {x}, b); }
inline void send(int rank, float* to, float x, float y, std::uint64_t* b) { send_all(rank, to, {x, y}, b); }

// ---- arithmetic
inline float as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned as_bits(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
// ex2.approx is good to 2 units in the last place: every other result is moved by 2^-22.5.
inline float ex2(float x) {
  x = flush(x);
  const float y = std::exp2(x);
  return flush(as_bits(x) * 2654435761u >> 31 && x != 0.0f ? y * (1.0f + 1.7e-7f) : y);
}
inline float rcp(float x) { return flush(1.0f / flush(x)); }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
inline unsigned bf16_bits(float x) {
  const unsigned u = as_bits(x);
  return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline unsigned pack_bf16x2(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline unsigned max_bf16x2(unsigned a, unsigned b) {
  return pack_bf16x2(max_nan(as_float(a << 16), as_float(b << 16)),
                     max_nan(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u)));
}
inline float2 fma2(float2 a, float2 b, float2 c) { return {std::fmaf(a.x, b.x, c.x), std::fmaf(a.y, b.y, c.y)}; }
inline float2 add2(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
inline float2 mul2(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }

// Runs the clusters of a grid one after another. `seed` decides who naps, and when late things happen.
inline void emulate(int clusters, int ranks, int threads, int shared_bytes, unsigned seed,
                    const std::function<void()>& kernel) {
  constexpr std::size_t kStack = 32 << 10;
  static std::vector<char> stacks;
  for (int c = 0; c < clusters; ++c) {
    Machine m;
    machine = &m;
    m.ranks = ranks, m.cluster = c, m.clusters = clusters, m.threads = threads;
    m.body = kernel;
    m.random.seed(seed + static_cast<unsigned>(c));
    const double patience = 0.02 + 0.5 * (m.random() % 1000) / 1000.0;  // chance of a late thing in a round
    m.shared.assign(static_cast<std::size_t>(ranks),
                    std::vector<unsigned char>(static_cast<std::size_t>(shared_bytes) + 128, 0x7f));
    m.running.assign(static_cast<std::size_t>(ranks), threads);
    m.warps.resize(static_cast<std::size_t>(ranks * threads / 32));
    m.fibers.resize(static_cast<std::size_t>(ranks * threads));
    if (stacks.size() < m.fibers.size() * kStack) stacks.resize(m.fibers.size() * kStack);
    for (std::size_t i = 0; i < m.fibers.size(); ++i) {
      m.fibers[i].block = static_cast<int>(i) / threads;
      m.fibers[i].thread = static_cast<int>(i) % threads;
    }
    const auto naps = static_cast<std::uint32_t>(4294967296.0 * (m.random() % 4) * 3e-5);
    std::uniform_real_distribution<double> chance(0, 1);
    const auto any = [&] {
      for (const int n : m.running) {
        if (n > 0) return true;
      }
      return false;
    };
    for (std::uint64_t round = 0; any(); ++round) {
      if (round > 200000) fail("deadlock");  // the longest test takes 12,000
      for (std::size_t i = 0; i < m.fibers.size(); ++i) {
        Fiber& f = m.fibers[i];
        if (f.finished || (f.asleep > 0 && --f.asleep > 0)) continue;
        if (m.random() < naps) f.asleep = static_cast<int>(m.random() % 400);  // falls behind all others
        resume(f, stacks.data() + i * kStack, kStack);
      }
      for (std::size_t k = 0; k < m.late.size();) {
        if (chance(m.random) < patience && m.late[k]()) {
          m.late[k] = m.late.back();
          m.late.pop_back();
        } else {
          ++k;
        }
      }
    }
    if (!m.late.empty()) fail("something was still under way when the last thread ended");
  }
}

}  // namespace fastft::cuda::bulk
