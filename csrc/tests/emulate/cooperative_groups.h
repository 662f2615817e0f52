// The part of cooperative groups that the kernels use, for emulate/cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return static_cast<unsigned>(emulate::block->ranks); }
  unsigned block_rank() const { return static_cast<unsigned>(emulate::block->rank); }
  // All of it at arrive: stricter than the hardware, so wait() has nothing left to do.
  void barrier_arrive() const {
    emulate::Block& b = *emulate::block;
    emulate::arrive(b.cluster_wait, b.threads, [&] { b.cluster->barrier.arrive_and_wait(); });
  }
  void barrier_wait() const {}
  template <class T>
  T* map_shared_rank(T* p, int rank) const {
    const std::ptrdiff_t offset = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(p)) - &emulate::anchor;
    return reinterpret_cast<T*>(emulate::block->cluster->anchors[static_cast<std::size_t>(rank)] + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
