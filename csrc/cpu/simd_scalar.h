// One lane: the portable path, and the code that the tests compare the wide ones with. V is a plain float.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastft/dtype.h"

namespace fastft::cpu::scalar {

#define FASTFT_INLINE static inline __attribute__((always_inline))

using V = float;
constexpr std::int64_t kWidth = 1;

FASTFT_INLINE float as_float(std::uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FASTFT_INLINE std::uint32_t as_bits(float f) {
  std::uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

FASTFT_INLINE V set1(float x) { return x; }
FASTFT_INLINE V load(const float* p) { return *p; }
FASTFT_INLINE V load(const bf16* p) { return as_float(static_cast<std::uint32_t>(p->bits) << 16); }
FASTFT_INLINE V load_n(const float* p, std::int64_t) { return load(p); }
FASTFT_INLINE V load_n(const bf16* p, std::int64_t) { return load(p); }
FASTFT_INLINE void store(float* p, V x) { *p = x; }
FASTFT_INLINE void store(bf16* p, V x) {
  const std::uint32_t u = as_bits(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  p->bits = static_cast<std::uint16_t>(x != x ? ((u >> 16) | 0x40u) : rounded);
}
FASTFT_INLINE void store_n(float* p, V x, std::int64_t) { store(p, x); }
FASTFT_INLINE void store_n(bf16* p, V x, std::int64_t) { store(p, x); }

FASTFT_INLINE V fma(V a, V b, V c) { return a * b + c; }
FASTFT_INLINE V fms(V a, V b, V c) {
  return static_cast<float>(static_cast<double>(a) * b - c);
}  // one rounding, as exp needs
FASTFT_INLINE V fnma(V a, V b, V c) { return c - a * b; }
FASTFT_INLINE V max(V x, V otherwise) { return x > otherwise ? x : otherwise; }  // the second where one is NaN
FASTFT_INLINE V sqrt(V x) { return __builtin_sqrtf(x); }
FASTFT_INLINE V abs(V x) { return __builtin_fabsf(x); }
FASTFT_INLINE V copysign(V x, V sign) { return __builtin_copysignf(x, sign); }
FASTFT_INLINE V select_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
FASTFT_INLINE V keep_n(V x, std::int64_t, float) { return x; }
FASTFT_INLINE V round(V x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22
// x * 2^n, and 0 where at < low (there n may be anything)
FASTFT_INLINE V ldexp_above(V x, V n, V at, float low) {
  if (at < low) return 0.0f;
  if (at != at) return at;
  return x * as_float(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23);
}
FASTFT_INLINE float first_lane(V x) { return x; }
FASTFT_INLINE float reduce_max(V x) { return x; }
FASTFT_INLINE float reduce_add(V x) { return x; }

struct Squares {  // a float64 sum
  double sum;
};
FASTFT_INLINE Squares no_squares() { return {0.0}; }
FASTFT_INLINE Squares add_squares(const Squares& s, V x) {
  return {s.sum + static_cast<double>(x) * static_cast<double>(x)};
}
FASTFT_INLINE double reduce_add(const Squares& s) { return s.sum; }

// Integers: as many lanes as V, unsigned unless said otherwise
using I = std::uint32_t;

FASTFT_INLINE I set1i(std::uint32_t x) { return x; }
FASTFT_INLINE I lane_numbers() { return 0; }
FASTFT_INLINE I bits(V x) { return as_bits(x); }
FASTFT_INLINE V floats(I x) { return as_float(x); }
FASTFT_INLINE V to_float(I x) { return static_cast<float>(static_cast<std::int32_t>(x)); }  // x < 2^31
FASTFT_INLINE I truncate(V x) {  // 0 <= x; from 2^31 on, as for NaN, 2^31
  return x < 2147483648.0f ? static_cast<I>(static_cast<std::int32_t>(x)) : 0x80000000u;
}
FASTFT_INLINE I iadd(I a, I b) { return a + b; }
FASTFT_INLINE I isub(I a, I b) { return a - b; }
FASTFT_INLINE I imul(I a, I b) { return a * b; }
FASTFT_INLINE I ixor(I a, I b) { return a ^ b; }
FASTFT_INLINE I iand(I a, I b) { return a & b; }
FASTFT_INLINE I ior(I a, I b) { return a | b; }
FASTFT_INLINE I imax(I a, I b) { return a > b ? a : b; }
FASTFT_INLINE I imin(I a, I b) { return a < b ? a : b; }
template <int N>
FASTFT_INLINE I shift_left(I x) {
  return x << N;
}
template <int N>
FASTFT_INLINE I shift_right(I x) {
  return x >> N;
}
FASTFT_INLINE I pick_less(V a, V b, I yes, I no) { return a < b ? yes : no; }
FASTFT_INLINE I pick_nan(V x, I yes, I no) { return x != x ? yes : no; }
FASTFT_INLINE I pick_first(std::int64_t n, I yes, I no) {
  return n > 0 ? yes : no;
}  // the first n lanes, 0 <= n <= kWidth
FASTFT_INLINE std::uint32_t reduce_max(I x) { return x; }
FASTFT_INLINE I load(const std::uint32_t* p) { return *p; }
FASTFT_INLINE I load(const std::int16_t* p) { return static_cast<I>(static_cast<std::int32_t>(*p)); }  // with its sign
FASTFT_INLINE I load(const std::uint8_t* p) { return *p; }
FASTFT_INLINE I load_n(const std::int16_t* p, std::int64_t) { return load(p); }
FASTFT_INLINE I load_n(const std::uint8_t* p, std::int64_t) { return load(p); }
FASTFT_INLINE void store(std::uint32_t* p, I x) { *p = x; }
FASTFT_INLINE void store(std::uint16_t* p, I x) { *p = static_cast<std::uint16_t>(x); }  // the lower 16 bits
FASTFT_INLINE void store(std::uint8_t* p, I x) { *p = static_cast<std::uint8_t>(x); }    // x < 256
FASTFT_INLINE void store_n(std::uint16_t* p, I x, std::int64_t) { store(p, x); }
FASTFT_INLINE void store_n(std::uint8_t* p, I x, std::int64_t) { store(p, x); }

}  // namespace fastft::cpu::scalar
