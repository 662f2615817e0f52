// Sixteen lanes: AVX-512 F, BW, VL, DQ. Compiled only in kernels_avx512.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fastft/dtype.h"

namespace fastft::cpu::avx512 {

#define FASTFT_INLINE static inline __attribute__((always_inline))

using V = __m512;
constexpr std::int64_t kWidth = 16;

FASTFT_INLINE __mmask16 mask_n(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

FASTFT_INLINE V set1(float x) { return _mm512_set1_ps(x); }
FASTFT_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FASTFT_INLINE V widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
FASTFT_INLINE V load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FASTFT_INLINE V load_n(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(mask_n(n), p); }
FASTFT_INLINE V load_n(const bf16* p, std::int64_t n) { return widen(_mm256_maskz_loadu_epi16(mask_n(n), p)); }
// To nearest, ties to even; NaN stays NaN. Integer code, because vcvtneps2bf16 treats denormals as zero, wants its own
// run-time check, and the loops that use this wait for memory anyway.
FASTFT_INLINE __m256i narrow(V x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
FASTFT_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
FASTFT_INLINE void store(bf16* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
FASTFT_INLINE void store_n(float* p, V x, std::int64_t n) { _mm512_mask_storeu_ps(p, mask_n(n), x); }
FASTFT_INLINE void store_n(bf16* p, V x, std::int64_t n) { _mm256_mask_storeu_epi16(p, mask_n(n), narrow(x)); }

FASTFT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FASTFT_INLINE V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
FASTFT_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
FASTFT_INLINE V max(V x, V otherwise) { return _mm512_max_ps(x, otherwise); }  // the second where one is NaN
FASTFT_INLINE V sqrt(V x) { return _mm512_sqrt_ps(x); }
FASTFT_INLINE V abs(V x) { return _mm512_abs_ps(x); }
FASTFT_INLINE V copysign(V x, V sign) {
  const V bit = set1(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, x), _mm512_and_ps(bit, sign));
}
FASTFT_INLINE V select_less(V a, V b, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
FASTFT_INLINE V keep_n(V x, std::int64_t n, float fill) { return _mm512_mask_blend_ps(mask_n(n), set1(fill), x); }
FASTFT_INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n, and 0 where at < low (there n may be anything); NaN passes
FASTFT_INLINE V ldexp_above(V x, V n, V at, float low) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(at, set1(low), _CMP_NLT_UQ), x, n);
}
FASTFT_INLINE float first_lane(V x) { return _mm512_cvtss_f32(x); }
FASTFT_INLINE float reduce_max(V x) { return _mm512_reduce_max_ps(x); }
FASTFT_INLINE float reduce_add(V x) { return _mm512_reduce_add_ps(x); }

struct Squares {  // float64 sums
  __m512d low, high;
};
FASTFT_INLINE Squares no_squares() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
FASTFT_INLINE Squares add_squares(const Squares& s, V x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return {_mm512_fmadd_pd(low, low, s.low), _mm512_fmadd_pd(high, high, s.high)};
}
FASTFT_INLINE double reduce_add(const Squares& s) { return _mm512_reduce_add_pd(_mm512_add_pd(s.low, s.high)); }

// Integers: as many lanes as V, unsigned unless said otherwise
using I = __m512i;

FASTFT_INLINE I set1i(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
FASTFT_INLINE I lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FASTFT_INLINE I bits(V x) { return _mm512_castps_si512(x); }
FASTFT_INLINE V floats(I x) { return _mm512_castsi512_ps(x); }
FASTFT_INLINE V to_float(I x) { return _mm512_cvtepi32_ps(x); }   // x < 2^31
FASTFT_INLINE I truncate(V x) { return _mm512_cvttps_epi32(x); }  // 0 <= x; from 2^31 on, as for NaN, 2^31
FASTFT_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
FASTFT_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
FASTFT_INLINE I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
FASTFT_INLINE I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
FASTFT_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
FASTFT_INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
FASTFT_INLINE I imax(I a, I b) { return _mm512_max_epu32(a, b); }
FASTFT_INLINE I imin(I a, I b) { return _mm512_min_epu32(a, b); }
template <int N>
FASTFT_INLINE I shift_left(I x) {
  return _mm512_slli_epi32(x, N);
}
template <int N>
FASTFT_INLINE I shift_right(I x) {
  return _mm512_srli_epi32(x, N);
}
FASTFT_INLINE I pick_less(V a, V b, I yes, I no) {
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
FASTFT_INLINE I pick_nan(V x, I yes, I no) {
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), no, yes);
}
FASTFT_INLINE I pick_first(std::int64_t n, I yes, I no) {  // the first n lanes, 0 <= n <= kWidth
  return _mm512_mask_blend_epi32(mask_n(n), no, yes);
}
FASTFT_INLINE std::uint32_t reduce_max(I x) { return _mm512_reduce_max_epu32(x); }
FASTFT_INLINE I load(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
FASTFT_INLINE I load(const std::int16_t* p) {  // with its sign
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTFT_INLINE I load(const std::uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTFT_INLINE I load_n(const std::int16_t* p, std::int64_t n) {
  return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask_n(n), p));
}
FASTFT_INLINE I load_n(const std::uint8_t* p, std::int64_t n) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask_n(n), p));
}
FASTFT_INLINE void store(std::uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
FASTFT_INLINE void store(std::uint16_t* p, I x) {  // the lower 16 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
FASTFT_INLINE void store(std::uint8_t* p, I x) {  // x < 256
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
FASTFT_INLINE void store_n(std::uint16_t* p, I x, std::int64_t n) {
  _mm256_mask_storeu_epi16(p, mask_n(n), _mm512_cvtepi32_epi16(x));
}
FASTFT_INLINE void store_n(std::uint8_t* p, I x, std::int64_t n) {
  _mm_mask_storeu_epi8(p, mask_n(n), _mm512_cvtepi32_epi8(x));
}

}  // namespace fastft::cpu::avx512
