// exp and tanh of one instruction set (FASTFT_ISA) against float64, over every region that the kernels use.
#include FASTFT_SIMD_HEADER

#include "check.h"

namespace fastft::cpu {
namespace FASTFT_ISA {
namespace {
#include "vector_math.h"

double max_ulp(float low, float high, bool tangent) {
  double worst = 0.0;
  float at = 0.0f;
  float buffer[kWidth];
  for (int i = 0; i <= 1000000; ++i) {
    const float x = low + (high - low) * (static_cast<float>(i) / 1e6f);
    const V y = tangent ? tanh(set1(x)) : exp(set1(x));
    store(buffer, y);
    const double truth = tangent ? std::tanh(static_cast<double>(x)) : std::exp(static_cast<double>(x));
    const float nearest = static_cast<float>(truth);
    const double ulp = std::fabs(static_cast<double>(std::nextafter(nearest, INFINITY)) - nearest);
    const double error = std::fabs(buffer[kWidth - 1] - truth) / ulp;
    if (error > worst) {
      worst = error;
      at = x;
    }
  }
  std::printf("%s on [%g, %g]: %.2f ulp at %.9g\n", tangent ? "tanh" : "exp", low, high, worst, at);
  return worst;
}

float one(V x) {
  float buffer[kWidth];
  store(buffer, x);
  return buffer[0];
}

void run() {
  CHECK(max_ulp(-1.0f, 1.0f, false) < 1.5, "exp near 0");
  CHECK(max_ulp(-16.0f, 0.0f, false) < 5.0, "exp of likely tokens");
  CHECK(max_ulp(-87.0f, 0.0f, false) < 22.0, "exp overall: 1.4e-8 |x|");
  CHECK(max_ulp(-0.63f, 0.63f, true) < 2.0, "tanh by polynomial");
  CHECK(max_ulp(-12.0f, 12.0f, true) < 3.0, "tanh by exp");
  CHECK(one(exp(set1(0.0f))) == 1.0f, "exp(0)");
  CHECK(one(exp(set1(-INFINITY))) == 0.0f, "exp(-inf)");
  CHECK(one(exp(set1(-1e30f))) == 0.0f, "exp(-1e30)");
  CHECK(std::isnan(one(exp(set1(NAN)))), "exp(nan)");
  CHECK(one(tanh(set1(INFINITY))) == 1.0f && one(tanh(set1(-INFINITY))) == -1.0f, "tanh(inf)");
  CHECK(std::isnan(one(tanh(set1(NAN)))), "tanh(nan)");
  CHECK(one(tanh(set1(1e-20f))) == 1e-20f, "tanh near 0");
}

// Every bit pattern whose upper half or lower half is interesting, rounded to bf16
void run_rounding() {
  float values[kWidth];
  bf16 rounded[kWidth];
  for (std::uint32_t high = 0; high < 0x10000; ++high) {
    for (std::uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const std::uint32_t u = high << 16 | low;
      float x;
      std::memcpy(&x, &u, 4);
      for (float& v : values) v = x;
      store(rounded, load(values));
      const bf16 want = check::nearest_bf16(x);
      const float got = check::widen(rounded[kWidth - 1]);
      CHECK(x != x ? got != got : rounded[kWidth - 1].bits == want.bits, "bits %08x gave %04x, want %04x", u,
            rounded[kWidth - 1].bits, want.bits);
    }
  }
}

}  // namespace
}  // namespace FASTFT_ISA
}  // namespace fastft::cpu

int main() {
  check::skip_unless_runnable();
  fastft::cpu::FASTFT_ISA::run();
  fastft::cpu::FASTFT_ISA::run_rounding();
  return check::finish();
}
