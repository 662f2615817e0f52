// Sum of squares against a float64 loop, at every length around the vector widths and the pieces.
#include "fastft/sum_squares.h"

#include "check.h"

using fastft::DType;
using fastft::SumSquaresTensor;

int main() {
  check::skip_unless_runnable();
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 1003, 32767, 32768, 32769, 100000}) {
    std::vector<float> x(static_cast<std::size_t>(n));
    std::vector<fastft::bf16> h(static_cast<std::size_t>(n));
    double truth_x = 0.0, truth_h = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      x[i] = normal(random) * 1e25f;
      std::uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      h[i].bits = static_cast<std::uint16_t>(bits >> 16);
      truth_x += static_cast<double>(x[i]) * x[i];
      truth_h += static_cast<double>(check::widen(h[i])) * check::widen(h[i]);
    }
    const SumSquaresTensor fx[] = {{x.data(), n}, {x.data(), n / 2}}, fh[] = {{h.data(), n}};
    double first = 0.0, again = 0.0, half = 0.0;
    fastft::sum_squares_cpu(fx, 1, DType::f32, &first, 1);
    fastft::sum_squares_cpu(fx, 1, DType::f32, &again, 3);
    fastft::sum_squares_cpu(fh, 1, DType::bf16, &half, 2);
    CHECK(std::fabs(first - truth_x) <= 1e-13 * truth_x, "n=%lld: %g, not %g", static_cast<long long>(n), first,
          truth_x);
    CHECK(first == again, "n=%lld: the number of threads shows", static_cast<long long>(n));
    CHECK(std::fabs(half - truth_h) <= 1e-13 * truth_h, "bf16 n=%lld: %g, not %g", static_cast<long long>(n), half,
          truth_h);
  }
  double none = 1.0;
  fastft::sum_squares_cpu(nullptr, 0, DType::f32, &none, 2);
  CHECK(none == 0.0, "an empty list sums to %g", none);
  return check::finish();
}
