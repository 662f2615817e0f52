// Softmax cross-entropy for sm_90 and later, one read and one write of the logits: loss, logsumexp and gradient.
//
// Persistent clusters of 1-8 blocks share a row, a contiguous slice each. Shared memory is a ring of slots of 16 (32)
// KB: a slice takes 1-5 of them, the others read ahead, also into the next rows. A block has 8 (16) warps that compute
// and one that moves.
//   load      the mover starts bulk copies (global to shared, a slot each, an mbarrier per slot) as slots come free
//   phase A   each thread: largest logit and sum of exp(x - largest) over the slots of this row
//   exchange  every warp sends (largest, sum) to every block of its cluster; one mbarrier wait, no __syncthreads
//   phase B   the same slots again: the gradient, in place in shared memory
//   store     the mover starts the bulk copy back; once a slot has been read, it is loaded with what comes next
// So memory has loads queued whatever the computing warps do, and these spend next to nothing on moving. A forward
// alone gives each slot back after phase A.
//
// Bulk copies want 16-byte alignment: up to 7 elements at each end of a row, the edges, go through registers of the
// first warp. Results repeat bit for bit: who adds what depends on the address of a row modulo 128 and on nothing else.
#pragma once

#include "cross_entropy_bulk_math.cuh"

namespace fastft::cuda::bulk {

struct Args {
  const void* logits;  // (rows, vocab); grad may be the same memory, else each row has the same address modulo 16
  void* grad;          // null: forward only
  const std::int64_t* target;
  float *loss, *lse;                                      // (rows,) or null
  const float *class_weight, *token_weight, *grad_scale;  // (vocab,), and (rows,) or one where the stride is 0; or null
  std::int64_t* bad_row;                                  // -1 at the start; or null
  std::int64_t rows, logits_stride, grad_stride, ignore_index, token_weight_stride, grad_scale_stride;
  int vocab, share;  // share: packs a block, from plan()
  float label_smoothing, z_loss, softcap, logit_scale;
};

// WARPS of a block compute: 8, with two blocks on a multiprocessor, so that one computes while the other exchanges; or
// 16 with one block, for longer rows.
template <int WARPS, bool SMOOTH>
struct Shape {
  static constexpr int lanes = WARPS * 32, threads = lanes + 32;  // the last warp moves
  static constexpr int packs = 4, slot_packs = packs * lanes, slot_bytes = slot_packs * 16;
  static constexpr int slots = SMOOTH && WARPS == 16 ? 6 : 7, max_ranks = WARPS / 2;
  static constexpr int fields = SMOOTH ? 3 : 2;  // numbers that a warp sends
  static constexpr int barriers = 2 * slots + 2, inbox = max_ranks * WARPS * fields;
  static constexpr int shared_bytes = slots * slot_bytes + barriers * 8 + 2 * inbox * 4, blocks = 16 / WARPS;
  static_assert(blocks * (shared_bytes + 1024) <= 228 * 1024, "more than a multiprocessor has");
};

// Blocks a row: at least `least`, else as few as leave 2 slots or more to read ahead into; 0: the row is too long. Sets
// args.share.
template <class S>
int plan(Args& a, int size, int least) {
  for (int ranks = 1; ranks <= S::max_ranks; ranks *= 2) {
    if (ranks < least) continue;
    a.share = static_cast<int>(((static_cast<std::int64_t>(a.vocab) * size / 16 + 7) / ranks + 8) / 8 * 8);
    if (a.share <= (S::slots - 2) * S::slot_packs) return ranks;
  }
  return 0;
}

// Where a row lies: elements before and after its packs; the first of this block's packs, and how many it has.
struct Slice {
  int head, tail, begin, packs;
};

template <class T>
FASTFT_DEVICE Slice slice_of(const Args& a, std::int64_t row, int rank) {
  constexpr int width = 16 / sizeof(T);
  const std::uint64_t first =
      reinterpret_cast<std::uint64_t>(a.logits) + static_cast<std::uint64_t>(row * a.logits_stride) * sizeof(T);
  int head = static_cast<int>((0 - first) % 16 / sizeof(T));
  head = head < a.vocab ? head : a.vocab;
  const int all = (a.vocab - head) / width;
  const int past = static_cast<int>((first + 15) / 16 % 8);  // slices meet at lines of 128 bytes
  int begin = rank * a.share - past, end = begin + a.share;
  begin = begin > 0 ? begin : 0;
  end = end < all ? end : all;
  return {head, a.vocab - head - all * width, begin, end > begin ? end - begin : 0};
}

// The rows of this cluster in order, looked at 32 at a time: one load of 32 targets, then no more waiting for targets.
struct Rows {
  std::int64_t first, step;
  int at = -1;     // which of this cluster's rows, set by next()
  int target = 0;  // of row at / 32 * 32 + lane: a class, kIgnored or kBad

  static constexpr int kIgnored = -1, kBad = -2;

  FASTFT_DEVICE bool next(const Args& a, int lane, std::int64_t& row, int& y) {  // by whole warps
    row = first + ++at * step;
    if (row >= a.rows) {
      --at;
      return false;
    }
    if (at % 32 == 0) {
      const std::int64_t mine = row + lane * step, t = mine < a.rows ? a.target[mine] : 0;
      target = t == a.ignore_index ? kIgnored : (t < 0 || t >= a.vocab ? kBad : static_cast<int>(t));
    }
    y = shuffle(target, at % 32);
    return true;
  }
};

struct Shared {
  unsigned char* ring;
  std::uint64_t* full;       // per slot: the logits have arrived
  std::uint64_t* done;       // per slot: every warp is through with it; its gradients are in place
  std::uint64_t* exchanged;  // two, rows take turns
  float* inbox;              // two: (top, sum) of every warp of the cluster, then totals
};

// Whether a row's logits are looked at; both kinds of warps have to agree.
FASTFT_DEVICE bool is_read(const Args& a, int y) { return y >= 0 || a.lse != nullptr; }

// The warp that moves: starts every bulk copy. All lanes walk along, lane 0 does it.
template <class T, class S>
FASTFT_DEVICE void move(const Args& a, const Shared& m, Rows rows, int rank, int lane) {
  constexpr int width = 16 / sizeof(T);
  Rows ahead = rows;
  int next_slot = 0, left = 0;
  const unsigned char* from = nullptr;
  const auto feed = [&] {  // what is read next, into the next slot; nothing after the last row
    std::int64_t row;
    int y;
    while (left == 0) {
      if (!ahead.next(a, lane, row, y)) return;
      if (!is_read(a, y)) continue;
      const Slice s = slice_of<T>(a, row, rank);
      left = s.packs;
      from = static_cast<const unsigned char*>(a.logits) +
             (row * a.logits_stride + s.head + static_cast<std::int64_t>(s.begin) * width) * sizeof(T);
    }
    const int packs = left < S::slot_packs ? left : S::slot_packs;
    if (lane == 0) {
      barrier_expect(&m.full[next_slot], packs * 16);
      bulk_load(m.ring + next_slot * S::slot_bytes, from, packs * 16, &m.full[next_slot]);
    }
    from += packs * 16;
    left -= packs;
    next_slot = next_slot + 1 == S::slots ? 0 : next_slot + 1;
  };
  for (int k = 0; k < S::slots; ++k) feed();
  int slot = 0, y;
  unsigned phase = 0;
  std::int64_t row;
  while (rows.next(a, lane, row, y)) {
    if (!is_read(a, y)) continue;
    const Slice s = slice_of<T>(a, row, rank);
    unsigned char* const to = static_cast<unsigned char*>(a.grad) +
                              (row * a.grad_stride + s.head + static_cast<std::int64_t>(s.begin) * width) * sizeof(T);
    for (int k = 0; k < s.packs; k += S::slot_packs) {
      barrier_wait(&m.done[slot], phase);
      if (a.grad == nullptr) {
        sync_warp();  // lane 0 must not get a whole phase ahead of a lane that still waits
        feed();
      } else {
        if (lane == 0) {
          bulk_store(to + k * 16, m.ring + slot * S::slot_bytes,
                     (s.packs - k < S::slot_packs ? s.packs - k : S::slot_packs) * 16);
          bulk_stores_read<1>();
        }
        sync_warp();
        if (k > 0) feed();  // into the slot of the store before this one
      }
      slot = slot + 1 == S::slots ? 0 : slot + 1;
      phase ^= slot == 0;
    }
    if (a.grad != nullptr && s.packs > 0) {
      if (lane == 0) bulk_stores_read<0>();
      sync_warp();
      feed();
    }
  }
  if (lane == 0) bulk_stores_done();
}

// Sums of the lanes of a warp, the same in every lane.
template <bool SMOOTH>
FASTFT_DEVICE void merge_lanes(RowSums& s, const Units& u) {
  float top = s.top;
#pragma unroll
  for (int k = 16; k > 0; k /= 2) top = max_nan(top, shuffle_xor(top, k));
  s.sum *= exp_below(s.top, finite_or_zero(top), u);
#pragma unroll
  for (int k = 16; k > 0; k /= 2) {
    s.sum += shuffle_xor(s.sum, k);
    if (SMOOTH) s.total += shuffle_xor(s.total, k);
  }
  s.top = top;
}

// A thread of the warps that compute.
template <class T, int WARPS, bool SMOOTH, bool CAP>
struct Computing {
  using S = Shape<WARPS, SMOOTH>;
  static constexpr int width = 16 / sizeof(T);

  const Args& a;
  const Shared& m;
  const Units u;
  const int rank, ranks, warp, lane;
  const bool first_warp;  // of the cluster: it has the edges
  int slot = 0;           // where the row begins in the ring, later where its gradients begin
  unsigned phase = 0, turn = 0;

  // One row's
  Slice s{};
  int whole = 0, rest = 0;  // full slots, packs of the last one
  int edge = -1;            // an element at an end of the row, or -1
  int target_slot = -1;     // which of the row's slots has the target among this thread's packs, or -1
  int target_at = 0;        // the element of that slot
  float edge_x = 0.0f, target_x = 0.0f;

  FASTFT_DEVICE Computing(const Args& args, const Shared& shared, int rank_, int ranks_, int warp_, int lane_)
      : a(args),
        m(shared),
        u(units(args.logit_scale, args.softcap, CAP)),
        rank(rank_),
        ranks(ranks_),
        warp(warp_),
        lane(lane_),
        first_warp(rank_ == 0 && warp_ == 0) {}

  FASTFT_DEVICE bool forward() const { return a.grad == nullptr; }
  FASTFT_DEVICE bool first() const { return first_warp && lane == 0; }  // the one that writes what a row has once
  FASTFT_DEVICE int me() const { return warp * 32 + lane; }
  FASTFT_DEVICE unsigned char* packs_of(int at) const { return m.ring + at * S::slot_bytes + me() * 16; }

  FASTFT_DEVICE void row(std::int64_t i, int y) {
    s = slice_of<T>(a, i, rank);
    const T* const logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
    T* const grad = static_cast<T*>(a.grad) + i * a.grad_stride;
    // Lanes 0-7 of the first warp have the head, 8-15 the tail.
    edge = -1;
    if (first_warp && lane < 8 && lane < s.head) edge = lane;
    if (first_warp && lane >= 8 && lane - 8 < s.tail) edge = a.vocab - s.tail + lane - 8;
    if (y < 0 && first()) {
      if (a.loss != nullptr) a.loss[i] = y == Rows::kIgnored ? 0.0f : NAN;
      if (y == Rows::kBad && a.bad_row != nullptr) atomic_min(a.bad_row, i);
    }
    if (!is_read(a, y)) {
      if (!forward()) write_zeros(grad);
      return;
    }
    // Needed after the packs: time to arrive.
    T edge_raw{}, target_raw{};
    if (edge >= 0) edge_raw = logits[edge];
    if (forward() && first() && y >= 0) target_raw = logits[y];
    const float token = a.token_weight != nullptr ? a.token_weight[i * a.token_weight_stride] : 1.0f;
    const float scale = a.grad_scale != nullptr ? a.grad_scale[i * a.grad_scale_stride] : 1.0f;
    const float w_y = !SMOOTH && a.class_weight != nullptr && y >= 0 ? a.class_weight[y] : 1.0f;
    whole = s.packs / S::slot_packs;
    rest = s.packs % S::slot_packs;

    RowSums sums{-INFINITY, 0.0f, 0.0f};
    const int end = add_slots(sums);
    edge_x = cap<CAP>(Words<T>::to_float(edge_raw), u);
    if (edge >= 0) add_one(sums, edge_x, u);
    target_x = forward() ? cap<CAP>(Words<T>::to_float(target_raw), u) : edge_x;
    find_target(y);

    exchange(sums);
    T of_target{};
    const Gradient g = finish(i, y, sums, token, scale, w_y, of_target);
    if (forward()) {
      slot = end;
      return;
    }
    if (edge >= 0) {
      const T d = edge == y ? of_target : Words<T>::from_float(one_gradient<CAP>(edge_x, false, g, u));
      grad[edge] = y < 0 ? T{} : d;
    }
    if (y < 0) zero_slots();
    else write_slots(g, of_target);
  }

  // A row whose logits are not even read
  FASTFT_DEVICE void write_zeros(T* grad) const {
    uint4* const to = reinterpret_cast<uint4*>(grad + s.head + static_cast<std::int64_t>(s.begin) * width);
    for (int k = me(); k < s.packs; k += S::lanes) to[k] = uint4{0, 0, 0, 0};
    if (edge >= 0) grad[edge] = T{};
  }

  // Phase A. Returns the slot after the row's last.
  FASTFT_DEVICE int add_slots(RowSums& sums) {
    int at = slot;
    const auto next = [&] {
      if (forward()) {
        sync_warp();
        if (lane == 0) barrier_arrive(&m.done[at]);
      }
      at = at + 1 == S::slots ? 0 : at + 1;
      phase ^= at == 0;
    };
#pragma unroll 1
    for (int k = 0; k < whole; ++k) {
      barrier_wait(&m.full[at], phase);
      add_packs<T, S::packs, S::lanes, SMOOTH, CAP>(packs_of(at), sums, u);
      next();
    }
    if (rest > 0) {
      barrier_wait(&m.full[at], phase);
#pragma unroll 1
      for (int k = 0; k < rest - me(); k += S::lanes) {
        add_packs<T, 1, S::lanes, SMOOTH, CAP>(packs_of(at) + k * 16, sums, u);
      }
      next();
    }
    return at;
  }

  // The thread that has the target among its packs keeps its logit before it is overwritten.
  FASTFT_DEVICE void find_target(int y) {
    const int in_packs = y - s.head - s.begin * width, pack = in_packs / width;
    const bool here = !forward() && y >= 0 && in_packs >= 0 && pack < s.packs && pack % S::lanes == me();
    target_slot = here ? pack / S::slot_packs : -1;
    target_at = in_packs % (S::slot_packs * width);
    if (here) {
      const int k = slot + target_slot < S::slots ? slot + target_slot : slot + target_slot - S::slots;
      target_x = cap<CAP>(Words<T>::to_float(reinterpret_cast<const T*>(m.ring + k * S::slot_bytes)[target_at]), u);
    }
  }

  // Sums of all warps of the cluster, merged by each of them in the same order. Two inboxes are enough: who sends for
  // the row after next has heard of the next row from everyone, and so everyone has read this row's inbox.
  FASTFT_DEVICE void exchange(RowSums& sums) {
    merge_lanes<SMOOTH>(sums, u);
    const int where = rank * WARPS + warp;
    float* const box = m.inbox + turn % 2 * S::inbox;
    float* const totals = box + ranks * WARPS * 2;
    std::uint64_t* const arrived = &m.exchanged[turn % 2];
    if (me() == 0) barrier_expect(arrived, ranks * WARPS * S::fields * 4);
    if (lane < ranks) {
      send(lane, box + where * 2, sums.top, sums.sum, arrived);
      if (SMOOTH) send(lane, totals + where, sums.total, arrived);
    }
    barrier_wait_cluster(arrived, turn++ / 2 % 2);
    sums = {-INFINITY, 0.0f, 0.0f};
#pragma unroll 1
    for (int k = lane; k < ranks * WARPS; k += 32) {
      const float top = max_nan(sums.top, box[k * 2]), from = finite_or_zero(top);
      sums.sum = sums.sum * exp_below(sums.top, from, u) + box[k * 2 + 1] * exp_below(box[k * 2], from, u);
      if (SMOOTH) sums.total += totals[k];
      sums.top = top;
    }
    merge_lanes<SMOOTH>(sums, u);
  }

  // From a row's sums: what the gradient needs. The target's thread writes the loss and makes the target's gradient.
  FASTFT_DEVICE Gradient finish(std::int64_t i, int y, const RowSums& sums, float token, float scale, float w_y,
                                T& of_target) const {
    const float sum = sums.sum == 0.0f ? NAN : sums.sum;  // every logit is -inf
    const float log_sum = logf(sum), lse = fmaf(u.real, sums.top, log_sum);
    const float part = SMOOTH ? a.label_smoothing : 0.0f, each = SMOOTH ? part / static_cast<float>(a.vocab) : 0.0f;
    const float outer = token * scale * a.logit_scale, weight = SMOOTH ? 1.0f - part : w_y;
    const float of_p = (SMOOTH ? 1.0f : w_y) + 2.0f * a.z_loss * lse;
    const Gradient g{finite_or_zero(sums.top), outer * of_p * rcp(sum), outer * each, outer * weight};
    if (forward() ? first() && y >= 0 : target_slot >= 0 || (y >= 0 && edge == y)) {
      // (top - x) + log_sum, not lse - x: exact also where the loss is tiny beside lse.
      float loss = weight * fmaf(u.real, sums.top - target_x, log_sum) + a.z_loss * lse * lse;
      if (SMOOTH) loss += each * (static_cast<float>(a.vocab) * lse - u.real * sums.total);
      if (a.loss != nullptr) a.loss[i] = token * loss;
      of_target = Words<T>::from_float(one_gradient<CAP>(target_x, true, g, u));
    }
    if (a.lse != nullptr && first()) a.lse[i] = lse;
    return g;
  }

  // Phase B
  FASTFT_DEVICE void write_slots(const Gradient& g, T of_target) {
#pragma unroll 1
    for (int k = 0; k < whole; ++k) {
      to_gradients<T, S::packs, S::lanes, SMOOTH, CAP>(packs_of(slot), g, u);
      hand_over(k, of_target);
    }
    if (rest > 0) {
#pragma unroll 1
      for (int k = 0; k < rest - me(); k += S::lanes) {
        to_gradients<T, 1, S::lanes, SMOOTH, CAP>(packs_of(slot) + k * 16, g, u);
      }
      hand_over(whole, of_target);
    }
  }

  // Not counted, but read for its lse: zeros, also where logits are NaN
  FASTFT_DEVICE void zero_slots() {
#pragma unroll 1
    for (int k = 0; k < whole + (rest > 0); ++k) {
      for (int j = 0; j < S::packs; ++j) reinterpret_cast<uint4*>(packs_of(slot))[j * S::lanes] = uint4{0, 0, 0, 0};
      hand_over(k, T{});
    }
  }

  // To the mover: the row's slot k is finished. The thread that wrote the target's pack puts its gradient there.
  FASTFT_DEVICE void hand_over(int k, T of_target) {
    if (k == target_slot) reinterpret_cast<T*>(m.ring + slot * S::slot_bytes)[target_at] = of_target;
    fence_async();
    sync_warp();
    if (lane == 0) barrier_arrive(&m.done[slot]);
    slot = slot + 1 == S::slots ? 0 : slot + 1;
  }
};

template <class T, int WARPS, bool SMOOTH, bool CAP>
__global__ void __launch_bounds__(Shape<WARPS, SMOOTH>::threads, Shape<WARPS, SMOOTH>::blocks)
    bulk_kernel(const __grid_constant__ Args a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using S = Shape<WARPS, SMOOTH>;
  const int thread = thread_index(), lane = thread % 32, warp = shuffle(thread / 32, 0);
  const int rank = cluster_rank(), ranks = cluster_size();
  unsigned char* const ring = shared_memory();
  std::uint64_t* const barriers = reinterpret_cast<std::uint64_t*>(ring + S::slots * S::slot_bytes);
  const Shared m{ring, barriers, barriers + S::slots, barriers + 2 * S::slots,
                 reinterpret_cast<float*>(barriers + S::barriers)};
  if (thread < S::barriers) {
    const bool done = thread >= S::slots && thread < 2 * S::slots;
    barrier_init(&barriers[thread], done ? WARPS : 1);
  }
  sync_cluster();  // nobody copies or sends before every block has its barriers
  Rows rows{block_index() / ranks, block_count() / ranks};
  if (warp == WARPS) {
    move<T, S>(a, m, rows, rank, lane);
  } else {
    Computing<T, WARPS, SMOOTH, CAP> computing(a, m, rank, ranks, warp, lane);
    std::int64_t row;
    int y;
    while (rows.next(a, lane, row, y)) computing.row(row, y);
  }
  sync_warp();     // one lane alone has waited for the last stores
  sync_cluster();  // a block's shared memory has to stay while others may still send to it
#else
  (void)a;  // the launcher asks for sm_90
#endif
}

}  // namespace fastft::cuda::bulk
