// Sum of squares on the CPU: pieces on all threads, their sums added in order.
#include "fastft/sum_squares.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastft {

void sum_squares_cpu(const SumSquaresTensor* tensors, std::size_t count, DType dtype, double* out, int num_threads) {
  constexpr std::int64_t piece = 32768;
  struct Piece {
    const char* data;
    std::int64_t n;
    double sum;
  };
  const std::int64_t size = dtype == DType::f32 ? 4 : 2;
  std::vector<Piece> pieces;
  for (std::size_t t = 0; t < count; ++t) {
    for (std::int64_t at = 0; at < tensors[t].numel; at += piece) {
      pieces.push_back(
          {static_cast<const char*>(tensors[t].data) + at * size, std::min(piece, tensors[t].numel - at), 0.0});
    }
  }
  const cpu::SumSquaresFn fn = cpu::kernels().sum_squares[static_cast<int>(dtype)];
  cpu::for_each_stealing(static_cast<std::int64_t>(pieces.size()), cpu::thread_count(num_threads), [&](std::int64_t i) {
    Piece& p = pieces[static_cast<std::size_t>(i)];
    p.sum = fn(p.data, p.n);
  });
  double total = 0.0;
  for (const Piece& p : pieces) total += p.sum;
  *out = total;
}

}  // namespace fastft
