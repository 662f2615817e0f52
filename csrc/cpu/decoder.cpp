// RMS norm, rotary embedding and gated MLP on the CPU: pieces of rows on all threads.
#include "fastft/decoder.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastft {
namespace {

constexpr std::int64_t kPiece = 16384;  // elements of a thread's turn
// Rows whose part of a weight's gradient is added up at once, whatever the number of threads
constexpr std::int64_t kRowsOfSum = 32;

// Row i of an array whose rows lie `stride` elements apart; null stays null
template <class P>
P row(P array, std::int64_t i, std::int64_t stride, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<P>>, const char, char>;
  return array ? static_cast<Byte*>(array) + i * stride * (dtype == DType::f32 ? 4 : 2) : nullptr;
}

template <class Body>
void over_rows(std::int64_t rows, std::int64_t columns, int num_threads, const Body& body) {
  const std::int64_t each = std::max<std::int64_t>(kPiece / std::max<std::int64_t>(columns, 1), 1);
  cpu::for_each_stealing((rows + each - 1) / each, cpu::thread_count(num_threads), [&](std::int64_t piece) {
    for (std::int64_t i = piece * each; i < std::min(rows, (piece + 1) * each); ++i) body(i);
  });
}

}  // namespace

void rms_forward_cpu(const RmsForward& a, int num_threads) {
  const cpu::RmsForwardFn fn = cpu::kernels().rms_forward[static_cast<int>(a.dtype)];
  over_rows(a.rows, a.columns, num_threads, [&](std::int64_t i) {
    const auto at = [&](auto array) { return row(array, i, a.columns, a.dtype); };
    a.rstd[i] = fn(at(a.x), at(a.residual), a.weight, at(a.total), at(a.y), a.columns, static_cast<float>(a.eps));
  });
}

void rms_backward_cpu(const RmsBackward& a, int num_threads) {
  const cpu::RmsBackwardFn fn = cpu::kernels().rms_backward[static_cast<int>(a.dtype)];
  const std::int64_t pieces = (a.rows + kRowsOfSum - 1) / kRowsOfSum;
  std::vector<float> sums(static_cast<std::size_t>(pieces * a.columns), 0.0f);
  const int threads = cpu::thread_count(num_threads);
  cpu::for_each_stealing(pieces, threads, [&](std::int64_t piece) {
    for (std::int64_t i = piece * kRowsOfSum; i < std::min(a.rows, (piece + 1) * kRowsOfSum); ++i) {
      const auto at = [&](auto array) { return row(array, i, a.columns, a.dtype); };
      fn(at(a.dy), at(a.x), a.weight, a.rstd[i], at(a.extra), at(a.dx), at(a.y), sums.data() + piece * a.columns,
         a.columns);
    }
  });
  constexpr std::int64_t columns = 1024;
  cpu::for_each_stealing((a.columns + columns - 1) / columns, threads, [&](std::int64_t part) {
    const std::int64_t begin = part * columns, end = std::min(a.columns, begin + columns);
    std::fill(a.dweight + begin, a.dweight + end, 0.0f);
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      for (std::int64_t c = begin; c < end; ++c) a.dweight[c] += sums[static_cast<std::size_t>(piece * a.columns + c)];
    }
  });
}

void rope_cpu(const Rope& a, int num_threads) {
  const cpu::RopeFn fn = cpu::kernels().rope[static_cast<int>(a.dtype)];
  over_rows(a.count, a.heads * a.dim, num_threads, [&](std::int64_t i) {
    const std::int64_t at = i % a.period * a.table_stride;
    fn(row(a.rows, i, a.stride, a.dtype), a.cos + at, a.sin + at, a.heads, a.dim, a.back ? -1.0f : 1.0f);
  });
}

void gated_forward_cpu(const GatedForward& a, int num_threads) {
  const cpu::GatedForwardFn fn = cpu::kernels().gated_forward[static_cast<int>(a.dtype)];
  over_rows(a.rows, a.width, num_threads, [&](std::int64_t i) {
    fn(row(a.gate, i, a.stride, a.dtype), row(a.up, i, a.stride, a.dtype), row(a.out, i, a.width, a.dtype), a.width);
  });
}

void gated_backward_cpu(const GatedBackward& a, int num_threads) {
  const cpu::GatedBackwardFn fn = cpu::kernels().gated_backward[static_cast<int>(a.dtype)];
  over_rows(a.rows, a.width, num_threads, [&](std::int64_t i) {
    const auto wide = [&](auto array) { return row(array, i, a.stride, a.dtype); };
    fn(wide(a.gate), wide(a.up), row(a.dout, i, a.width, a.dtype), row(a.out, i, a.width, a.dtype), wide(a.dgate),
       wide(a.dup), a.width);
  });
}

}  // namespace fastft
