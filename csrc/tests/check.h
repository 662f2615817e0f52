// A test is a main() that uses CHECK and ends with finish(). Exit code 77 tells ctest that this CPU cannot run the
// path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <stdexcept>
#include <vector>

#include "fastft/dtype.h"
#include "kernels.h"

namespace check {

inline int failures = 0;
inline long long checked = 0;

// printf-style context follows the condition
#define CHECK(condition, ...)                                     \
  do {                                                            \
    ++check::checked;                                             \
    if (!(condition) && check::failures++ < 20) {                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

inline int finish() {
  std::printf("%lld checks, %d failed\n", checked, failures);
  return failures == 0 ? 0 : 1;
}

inline void skip_unless_runnable() {
  try {
    std::printf("path %s\n", fastft::cpu::kernels().name);
  } catch (const std::invalid_argument& e) {
    std::printf("skipped: %s\n", e.what());
    std::exit(77);
  }
}

inline float widen(fastft::bf16 x) {
  const std::uint32_t u = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// The nearest bf16 by search over its two neighbours, not by the trick that the kernels use
inline fastft::bf16 nearest_bf16(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  const fastft::bf16 below{static_cast<std::uint16_t>(u >> 16)};
  if (x != x || std::isinf(x)) return x != x ? fastft::bf16{0x7fc0} : below;
  const fastft::bf16 above{static_cast<std::uint16_t>((u >> 16) + 1)};
  const double to_below = std::fabs(static_cast<double>(x) - widen(below));
  const double to_above = std::isinf(widen(above)) ? std::fabs(std::ldexp(1.0, 128) - std::fabs(x))
                                                   : std::fabs(static_cast<double>(x) - widen(above));
  if (to_below != to_above) return to_below < to_above ? below : above;
  return below.bits % 2 == 0 ? below : above;
}

inline std::mt19937& rng() {
  // The same inputs in every run, unless FASTFT_TEST_SEED is another number or "random".
  static std::mt19937 engine = [] {
    const char* given = std::getenv("FASTFT_TEST_SEED");
    unsigned seed = given ? static_cast<unsigned>(std::strtoul(given, nullptr, 10)) : 1;
    if (given && std::strcmp(given, "random") == 0) seed = std::random_device{}();
    std::printf("FASTFT_TEST_SEED=%u\n", seed);
    return std::mt19937(seed);
  }();
  return engine;
}

inline std::vector<float> normal(std::int64_t n, float scale) {
  std::normal_distribution<float> d(0.0f, scale);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) v = d(rng());
  return x;
}

// n elements of either type, at any alignment: offset counts elements from an aligned start.
struct Array {
  std::vector<unsigned char> bytes;
  fastft::DType dtype;
  std::int64_t offset;

  Array(const std::vector<float>& values, fastft::DType type, std::int64_t at = 0)
      : bytes((values.size() + static_cast<std::size_t>(at)) * 4 + 4), dtype(type), offset(at) {
    for (std::size_t i = 0; i < values.size(); ++i) set(static_cast<std::int64_t>(i), values[i]);
  }
  void* data() { return bytes.data() + offset * (dtype == fastft::DType::f32 ? 4 : 2); }
  float get(std::int64_t i) {
    if (dtype == fastft::DType::f32) return static_cast<float*>(data())[i];
    return widen(static_cast<fastft::bf16*>(data())[i]);
  }
  void set(std::int64_t i, float x) {
    if (dtype == fastft::DType::f32) static_cast<float*>(data())[i] = x;
    else static_cast<fastft::bf16*>(data())[i] = nearest_bf16(x);
  }
};

}  // namespace check
