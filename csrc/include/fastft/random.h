// The random numbers of stochastic rounding: a function of (seed, step, element) and nothing else, so that a shard can
// be rounded alone. Wellons' lowbias32 (two multiply-xorshift rounds) with keys; defined in
// fastft/ops/quantized_state.py. Here is what is scalar: the keys. Everything is static, for the reason that dtype.h
// gives.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTFT_HOST_DEVICE __host__ __device__
#else
#define FASTFT_HOST_DEVICE
#endif

namespace fastft {

constexpr std::uint32_t kMix1 = 0x7feb352du, kMix2 = 0x846ca68bu;
constexpr std::uint32_t kSecond = 0x9e3779b1u;  // the upper half of an element's word times this is its second word

FASTFT_HOST_DEVICE static inline std::uint32_t random_mix(std::uint32_t x) {
  x = (x ^ x >> 16) * kMix1;
  x = (x ^ x >> 15) * kMix2;
  return x ^ x >> 16;
}

// Once per tensor and step; step is the number of the step that is being made, from 1.
FASTFT_HOST_DEVICE static inline std::uint32_t random_base(std::uint64_t seed, std::uint32_t step) {
  const std::uint32_t low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
  return random_mix(random_mix(random_mix(low ^ 0x9e3779b9u) + high) + step);
}

// Of all elements whose index has these upper 32 bits
FASTFT_HOST_DEVICE static inline std::uint32_t random_key0(std::uint32_t base, std::uint32_t upper) {
  return random_mix(base + 0x85ebca6bu + upper);
}

FASTFT_HOST_DEVICE static inline std::uint32_t random_key1(std::uint32_t base) {
  return random_mix(base ^ 0xc2b2ae35u);
}

}  // namespace fastft
