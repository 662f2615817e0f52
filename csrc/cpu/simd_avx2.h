// Eight lanes: AVX2 with FMA. Compiled only in kernels_avx2.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fastft/dtype.h"

namespace fastft::cpu::avx2 {

#define FASTFT_INLINE static inline __attribute__((always_inline))

using V = __m256;
constexpr std::int64_t kWidth = 8;

// mask_n(n): the first n of 8 lanes, 0 <= n <= 8
FASTFT_INLINE __m256i mask_n(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTFT_INLINE V set1(float x) { return _mm256_set1_ps(x); }
FASTFT_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
FASTFT_INLINE V widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
FASTFT_INLINE V load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTFT_INLINE V load_n(const float* p, std::int64_t n) { return _mm256_maskload_ps(p, mask_n(n)); }
FASTFT_INLINE V load_n(const bf16* p, std::int64_t n) {
  alignas(16) bf16 buffer[8] = {};
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
FASTFT_INLINE __m128i narrow(V x) {  // to nearest, ties to even; NaN stays NaN
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTFT_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
FASTFT_INLINE void store(bf16* p, V x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
FASTFT_INLINE void store_n(float* p, V x, std::int64_t n) { _mm256_maskstore_ps(p, mask_n(n), x); }
FASTFT_INLINE void store_n(bf16* p, V x, std::int64_t n) {
  alignas(16) bf16 buffer[8];
  store(buffer, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

FASTFT_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
FASTFT_INLINE V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
FASTFT_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
FASTFT_INLINE V max(V x, V otherwise) { return _mm256_max_ps(x, otherwise); }  // the second where one is NaN
FASTFT_INLINE V sqrt(V x) { return _mm256_sqrt_ps(x); }
FASTFT_INLINE V sign_bit() { return _mm256_set1_ps(-0.0f); }
FASTFT_INLINE V abs(V x) { return _mm256_andnot_ps(sign_bit(), x); }
FASTFT_INLINE V copysign(V x, V sign) { return _mm256_or_ps(abs(x), _mm256_and_ps(sign_bit(), sign)); }
FASTFT_INLINE V select_less(V a, V b, V yes, V no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FASTFT_INLINE V keep_n(V x, std::int64_t n, float fill) {
  return _mm256_blendv_ps(set1(fill), x, _mm256_castsi256_ps(mask_n(n)));
}
FASTFT_INLINE V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n, and 0 where at < low (there n may be anything)
FASTFT_INLINE V ldexp_above(V x, V n, V at, float low) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const V scaled = _mm256_mul_ps(x, _mm256_castsi256_ps(e));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(at, set1(low), _CMP_NLT_UQ));  // NaN passes
}
FASTFT_INLINE float first_lane(V x) { return _mm256_cvtss_f32(x); }
FASTFT_INLINE float reduce_max(V x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
FASTFT_INLINE float reduce_add(V x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

struct Squares {  // float64 sums
  __m256d low, high;
};
FASTFT_INLINE Squares no_squares() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
FASTFT_INLINE Squares add_squares(const Squares& s, V x) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  return {_mm256_fmadd_pd(low, low, s.low), _mm256_fmadd_pd(high, high, s.high)};
}
FASTFT_INLINE double reduce_add(const Squares& s) {
  const __m256d both = _mm256_add_pd(s.low, s.high);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}

// Integers: as many lanes as V, unsigned unless said otherwise
using I = __m256i;

FASTFT_INLINE I set1i(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
FASTFT_INLINE I lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FASTFT_INLINE I bits(V x) { return _mm256_castps_si256(x); }
FASTFT_INLINE V floats(I x) { return _mm256_castsi256_ps(x); }
FASTFT_INLINE V to_float(I x) { return _mm256_cvtepi32_ps(x); }   // x < 2^31
FASTFT_INLINE I truncate(V x) { return _mm256_cvttps_epi32(x); }  // 0 <= x; from 2^31 on, as for NaN, 2^31
FASTFT_INLINE I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
FASTFT_INLINE I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
FASTFT_INLINE I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
FASTFT_INLINE I ixor(I a, I b) { return _mm256_xor_si256(a, b); }
FASTFT_INLINE I iand(I a, I b) { return _mm256_and_si256(a, b); }
FASTFT_INLINE I ior(I a, I b) { return _mm256_or_si256(a, b); }
FASTFT_INLINE I imax(I a, I b) { return _mm256_max_epu32(a, b); }
FASTFT_INLINE I imin(I a, I b) { return _mm256_min_epu32(a, b); }
template <int N>
FASTFT_INLINE I shift_left(I x) {
  return _mm256_slli_epi32(x, N);
}
template <int N>
FASTFT_INLINE I shift_right(I x) {
  return _mm256_srli_epi32(x, N);
}
FASTFT_INLINE I pick_less(V a, V b, I yes, I no) { return bits(select_less(a, b, floats(yes), floats(no))); }
FASTFT_INLINE I pick_nan(V x, I yes, I no) {
  return bits(_mm256_blendv_ps(floats(no), floats(yes), _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
FASTFT_INLINE I pick_first(std::int64_t n, I yes, I no) {  // the first n lanes, 0 <= n <= kWidth
  return _mm256_blendv_epi8(no, yes, mask_n(n));
}
FASTFT_INLINE std::uint32_t reduce_max(I x) {
  __m128i h = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  h = _mm_max_epu32(h, _mm_shuffle_epi32(h, 0x4e));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(h, _mm_shuffle_epi32(h, 0xb1))));
}
FASTFT_INLINE I load(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FASTFT_INLINE I load(const std::int16_t* p) {  // with its sign
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTFT_INLINE I load(const std::uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
FASTFT_INLINE I load_some(const T* p, std::int64_t n) {
  alignas(16) T buffer[8] = {};
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
FASTFT_INLINE I load_n(const std::int16_t* p, std::int64_t n) { return load_some(p, n); }
FASTFT_INLINE I load_n(const std::uint8_t* p, std::int64_t n) { return load_some(p, n); }
FASTFT_INLINE void store(std::uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
FASTFT_INLINE void store(std::uint16_t* p, I x) {  // the lower 16 bits
  const I low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
FASTFT_INLINE void store(std::uint8_t* p, I x) {  // x < 256
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
template <class T>
FASTFT_INLINE void store_some(T* p, I x, std::int64_t n) {
  alignas(16) T buffer[8];
  store(buffer, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
FASTFT_INLINE void store_n(std::uint16_t* p, I x, std::int64_t n) { store_some(p, x, n); }
FASTFT_INLINE void store_n(std::uint8_t* p, I x, std::int64_t n) { store_some(p, x, n); }

}  // namespace fastft::cpu::avx2
