// Softmax cross-entropy that reads a row once: the row lies in the registers of one block, or of a cluster of blocks
// (sm_90 on), 32 logits a thread. One read, one exp, one write: bf16 4 bytes per logit, fp32 8.
//
// Every thread takes exp(x - m) with m the largest of its own 32 logits, so that only one exchange is needed: (max,
// sum) pairs meet in the block, then across the cluster through distributed shared memory, and the gradient is the
// stored exp times one factor per thread.
#pragma once

#include "cross_entropy_row.cuh"

namespace fastft::cuda {

constexpr int kResidentLogits = 32;  // of a thread
// At most this many threads a block. The launcher takes fewer where it can: 32 logits and their bookkeeping are up to
// 88 registers, so two blocks of 352 share a multiprocessor and one reads while the other waits at a barrier; forcing
// two of 512 (64 registers) spills.
constexpr int kResidentThreads = 512, kResidentThreadsWanted = 352;

// The cluster's blocks in step, where there is one. arrive/wait are halves of one barrier: what lies between overlaps.
template <bool CLUSTER>
struct Cluster {
  int ranks = 1, rank = 0;

  __device__ inline Cluster() {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) {
      ranks = static_cast<int>(cooperative_groups::this_cluster().num_blocks());
      rank = static_cast<int>(cooperative_groups::this_cluster().block_rank());
    }
#endif
  }
  __device__ inline void arrive() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }
  __device__ inline void wait() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) cooperative_groups::this_cluster().barrier_wait();
#endif
  }
  // Another block's copy of a shared variable
  template <class S>
  __device__ inline const S* of_rank(const S* shared, int other) const {
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER) return cooperative_groups::this_cluster().map_shared_rank(const_cast<S*>(shared), other);
#endif
    (void)other;
    return shared;
  }

  // Sums over all blocks, merged in the order of their ranks by everyone. After it a block must arrive() and, before it
  // ends, wait(): the others may still be reading its copy.
  __device__ inline Sums merge_blocks(const Sums& s) const {
    if constexpr (!CLUSTER) return s;
    FASTFT_SHARED(Sums, mine, 1);
    FASTFT_SHARED(Sums, all, 16);
    if (threadIdx.x == 0) mine[0] = s;
    arrive();
    wait();
    if (static_cast<int>(threadIdx.x) < ranks) all[threadIdx.x] = *of_rank(mine, static_cast<int>(threadIdx.x));
    __syncthreads();
    Sums total = all[0];
    for (int r = 1; r < ranks; ++r) total = merge(total, all[r]);
    return total;
  }
};

// Where a row's 16-byte packs lie: they start up to a pack before the row, and those at its ends are moved element by
// element.
template <class T>
struct Packs {
  static constexpr int width = 16 / sizeof(T);
  static constexpr int per_thread = kResidentLogits / width;
  int past, vocab;  // a resident row has at most 16 * 16384 logits: 32-bit indices, or registers spill

  __device__ inline Packs(const T* row, int n)
      : past(static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T))), vocab(n) {}

  // Whether element `at` of the row, counted from its first, is there.
  __device__ inline bool holds(int at) const { return static_cast<unsigned>(at) < static_cast<unsigned>(vocab); }

  // Makes the compiler forget what it knows of the indices. Without it, it keeps those of the reading loop for the
  // writing one, and spills.
  __device__ inline void forget() {
#if defined(__CUDA_ARCH__) && defined(__CUDACC__)
    asm volatile("" : "+r"(past), "+r"(vocab));
#endif
  }

  // Calls body(first element's index in the row, slot in the thread's registers, whether all of it lies in the row) for
  // this thread's packs; neighbouring threads hold neighbouring packs, and all blocks of the cluster walk side by side.
  template <class Body>
  __device__ inline void for_each(int ranks, int rank, Body body) const {
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int at = ((k * ranks + rank) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * width - past;
      body(at, k * width, at >= 0 && at + width <= vocab);
    }
  }
};

template <class T, bool CAP, bool SMOOTH, bool CLUSTER>
__global__ void __maxnreg__(CAP ? 128 : 88) resident_kernel(const __grid_constant__ CrossEntropyArgs a) {
  const Cluster<CLUSTER> cluster;
  const int i = static_cast<int>(blockIdx.x) / cluster.ranks;
  const bool first = threadIdx.x == 0 && cluster.rank == 0;
  const T* row = static_cast<const T*>(a.logits) + i * a.logits_stride;
  // Computed when needed: registers are short.
  const auto grad_row = [&] { return static_cast<T*>(a.grad) + i * a.grad_stride; };
  Packs<T> packs(row, static_cast<int>(a.vocab));
  constexpr int width = Packs<T>::width;

  const RowTarget t = row_target(a, i, first);
  if (!t.counts && a.lse == nullptr) {  // the logits are not even read
    T* grad = grad_row();
    packs.for_each(cluster.ranks, cluster.rank, [&](int at, int, bool whole) {
      const float zeros[width] = {};
      if (whole) return store<width>(grad + at, zeros);
      for (int j = 0; j < width; ++j) {
        if (packs.holds(at + j)) grad[at + j] = from_float<T>(0.0f);
      }
    });
    return;
  }

  const float scale = static_cast<float>(a.logit_scale), softcap = static_cast<float>(a.softcap);
  const float x_y = t.counts ? cap<CAP>(to_float(row[t.y]) * scale, softcap) : 0.0f;
  float x[kResidentLogits];
  Sums s{-INFINITY, 0.0f, 0.0f, 0.0f};
  packs.for_each(cluster.ranks, cluster.rank, [&](int at, int slot, bool whole) {
    float y[width];
    if (whole) load<width>(row + at, y);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const bool there = whole || packs.holds(at + j);
      if (there && !whole) y[j] = to_float(row[at + j]);
      const float c = there ? cap<CAP>(y[j] * scale, softcap) : -INFINITY;
      if (SMOOTH && there) {
        const float w = a.class_weight != nullptr ? a.class_weight[at + j] : 1.0f;
        s.weighted = fmaf(w, c, s.weighted);
        s.weights += w;
      }
      s.max = fmaxf(s.max, c);  // passes over NaN; the sum below keeps it
      x[slot + j] = c;
    }
  });
  const float own = s.max;
#pragma unroll
  for (int j = 0; j < kResidentLogits; ++j) {
    const float e = exp_below(x[j], own);
    s.sum += e;
    if (!CAP) x[j] = e;  // under a cap the gradient needs the logit too, and takes exp again
  }
  s = cluster.merge_blocks(block_merge(s));
  cluster.arrive();                   // its second half (wait) is at the end
  RowGrad g{0.0f, 0.0f, 0.0f, 0.0f};  // an ignored row's
  if (t.counts) {
    g = finish_row<SMOOTH>(a, i, t.y, s, x_y, first);
  } else if (first) {
    a.lse[i] = s.sum == 0.0f ? NAN : s.max + logf(s.sum);
  }

  packs.forget();
  T* grad = grad_row();
  const int y = t.counts ? static_cast<int>(t.y) : -1 - width;
  const float factor = g.factor * exp_below(own, g.max);
  packs.for_each(cluster.ranks, cluster.rank, [&](int at, int slot, bool whole) {
    float d[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float c = x[slot + j];
      d[j] = CAP ? exp_below(c, g.max) * g.factor : c * factor;
      if (SMOOTH && (whole || packs.holds(at + j))) {
        d[j] -= g.smooth * (a.class_weight != nullptr ? a.class_weight[at + j] : 1.0f);
      }
      if (at + j == y) d[j] -= g.target_term;  // in fp32, before rounding
      if (CAP) d[j] *= 1.0f - (c / softcap) * (c / softcap);
      if (!t.counts) d[j] = 0.0f;  // also where the row's logits are NaN
    }
    if (whole) return store<width>(grad + at, d);
    for (int j = 0; j < width; ++j) {
      if (packs.holds(at + j)) grad[at + j] = from_float<T>(d[j]);
    }
  });
  cluster.wait();
}

}  // namespace fastft::cuda
