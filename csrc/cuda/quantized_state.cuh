// Random numbers, stochastic rounding, remainders and 8-bit codes of one element: fastft/ops/quantized_state.py, bit
// for bit.
#pragma once

#include <cstdint>

#include "common.cuh"
#include "fastft/random.h"

namespace fastft::cuda {

struct RandomKeys {
  std::uint32_t key0, key0_after, key1, high;
};

// For elements from `position` on, fewer than 2^32 of them
__device__ inline RandomKeys random_keys(std::uint32_t base, std::int64_t position) {
  const std::uint32_t high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(position) >> 32);
  return {random_key0(base, high), random_key0(base, high + 1), random_key1(base), high};
}

// 16 bits for the param above 16 bits for exp_avg
__device__ inline std::uint32_t random_first(const RandomKeys& k, std::int64_t position) {
  const bool same = static_cast<std::uint32_t>(static_cast<std::uint64_t>(position) >> 32) == k.high;
  std::uint32_t x = static_cast<std::uint32_t>(position) ^ (same ? k.key0 : k.key0_after);
  x = (x ^ x >> 16) * kMix1 + k.key1;
  x = (x ^ x >> 15) * kMix2;
  return x ^ x >> 16;
}

// The upper 16 bits are for exp_avg_sq
__device__ inline std::uint32_t random_second(std::uint32_t first) { return first * kSecond; }

__device__ inline bf16 round_stochastic(float x, std::uint32_t random) {  // random < 2^16
  const std::uint32_t u = __float_as_uint(x);
  return {static_cast<std::uint16_t>(x != x ? (u >> 16 | 0x40u) : (u + random) >> 16)};
}

__device__ inline bf16 upper_half(float x) {  // to nearest, ties away from zero
  const std::uint32_t u = __float_as_uint(x);
  return {static_cast<std::uint16_t>(x != x ? (u >> 16 | 0x40u) : (u + 0x8000u) >> 16)};
}

__device__ inline std::int16_t lower_half(float x) {
  return x != x ? std::int16_t{0} : static_cast<std::int16_t>(__float_as_uint(x));
}

__device__ inline float join(bf16 upper, std::int16_t lower) {
  return __uint_as_float((static_cast<std::uint32_t>(upper.bits) << 16) +
                         static_cast<std::uint32_t>(static_cast<std::int32_t>(lower)));
}

// exp_avg: a sign and codes of 14 binades above 8 steps of 2^-17; exp_avg_sq: codes of 30 binades above 8 steps of
// 2^-33.
template <bool kSigned>
struct Code {
  static constexpr float kLow = kSigned ? 1.0f / (1 << 14) : 1.0f / (1 << 30);  // below: steps
  static constexpr std::uint32_t kOffset = (kSigned ? 127 - 14 - 1 : 127 - 30 - 1) << 3;
};

template <bool kSigned>
__device__ inline float decode(std::uint8_t code, float scale) {
  const std::uint32_t magnitude = kSigned ? code & 0x7fu : code;
  const float steps = static_cast<float>(magnitude) * (Code<kSigned>::kLow / 8);
  const float x = (magnitude < 8 ? steps : __uint_as_float((magnitude + Code<kSigned>::kOffset) << 20)) * scale;
  return kSigned && code > 0x7f ? -x : x;
}

// |x| rounded to 3 mantissa bits, as bits: what the scale is taken from
__device__ inline std::uint32_t rounded_bits(float x, std::uint32_t random) {
  return (__float_as_uint(fabsf(x)) + (random << 4)) & 0xfff00000u;
}

template <bool kSigned>
__device__ inline std::uint8_t encode(float x, std::uint32_t random, float inverse_scale) {
  const float scaled = fabsf(x) * inverse_scale, low = Code<kSigned>::kLow;
  const float steps = fminf(scaled, low) * (8 / low) + static_cast<float>(random) * (1.0f / 65536);
  const std::uint32_t above = ((__float_as_uint(scaled) + (random << 4)) >> 20) - Code<kSigned>::kOffset;
  const std::uint32_t code = scaled < low ? static_cast<std::uint32_t>(steps) : above;
  if (kSigned) return static_cast<std::uint8_t>(code | (__float_as_uint(x) >> 31 << 7));
  return static_cast<std::uint8_t>(code == 0 && x != 0.0f ? 1u : code);
}

struct BlockScale {
  float scale, inverse;
  bool broken;  // NaN, Inf or beyond 2^126: the whole block reads as NaN
};

__device__ inline BlockScale block_scale(std::uint32_t top) {
  const std::uint32_t power = (top + 0x7fffffu) & 0x7f800000u, bits = power < 34u << 23 ? 34u << 23 : power;
  if (top > 253u << 23) return {__uint_as_float(0x7fc00000u), 0.0f, true};
  return {__uint_as_float(bits), __uint_as_float((254u << 23) - bits), false};
}

}  // namespace fastft::cuda
