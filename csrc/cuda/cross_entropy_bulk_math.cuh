// The arithmetic of cross_entropy_bulk.cuh: 16-byte packs of logits, and what a thread does to its packs in each phase.
#pragma once

#ifdef FASTFT_EMULATE_BULK
#include "bulk_copy.h"
#else
#include "bulk_copy.cuh"
#endif
#include "fastft/dtype.h"

namespace fastft::cuda::bulk {

constexpr float kLog2e = 1.44269504088896341f;

FASTFT_DEVICE float2 both(float x) { return {x, x}; }

// 16 bytes of logits as pairs of floats
template <class T>
struct Words;

template <>
struct Words<bf16> {
  static constexpr int pairs = 4;
  FASTFT_DEVICE static float2 get(const uint4& w, int p) {
    const unsigned x = (&w.x)[p];
    return {as_float(x << 16), as_float(x & 0xffff0000u)};
  }
  FASTFT_DEVICE static void put(uint4& w, int p, float2 v) { (&w.x)[p] = pack_bf16x2(v.x, v.y); }
  template <int N>
  FASTFT_DEVICE static float largest(const uint4 (&w)[N]) {  // two at a time; NaN wins
    unsigned m = max_bf16x2(max_bf16x2(w[0].x, w[0].y), max_bf16x2(w[0].z, w[0].w));
#pragma unroll
    for (int k = 1; k < N; ++k) {
      m = max_bf16x2(m, max_bf16x2(max_bf16x2(w[k].x, w[k].y), max_bf16x2(w[k].z, w[k].w)));
    }
    return max_nan(as_float(m << 16), as_float(m & 0xffff0000u));
  }
  FASTFT_DEVICE static float to_float(bf16 x) { return as_float(static_cast<unsigned>(x.bits) << 16); }
  FASTFT_DEVICE static bf16 from_float(float x) { return {static_cast<std::uint16_t>(pack_bf16x2(x, 0.0f))}; }
};

template <>
struct Words<float> {
  static constexpr int pairs = 2;
  FASTFT_DEVICE static float2 get(const uint4& w, int p) {
    return {as_float((&w.x)[2 * p]), as_float((&w.x)[2 * p + 1])};
  }
  FASTFT_DEVICE static void put(uint4& w, int p, float2 v) {
    (&w.x)[2 * p] = as_bits(v.x);
    (&w.x)[2 * p + 1] = as_bits(v.y);
  }
  template <int N>
  FASTFT_DEVICE static float largest(const uint4 (&w)[N]) {
    float m = -INFINITY;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float xy = max_nan(as_float(w[k].x), as_float(w[k].y)), zw = max_nan(as_float(w[k].z), as_float(w[k].w));
      m = max_nan(m, max_nan(xy, zw));
    }
    return m;
  }
  FASTFT_DEVICE static float to_float(float x) { return x; }
  FASTFT_DEVICE static float from_float(float x) { return x; }
};

// Without a softcap a kernel works on the logits as they lie in memory: logit_scale > 0 keeps their order, and joins
// the factor that exp needs anyway. With one it works on capped logits.
struct Units {
  float log2e;               // e^x = 2^(log2e * x) in the kernel's units of x
  float real;                // the loss's logits = real * x
  float inner, softcap, of;  // under a cap x = softcap * tanh(inner * logit); of = 1 / softcap
};

FASTFT_DEVICE Units units(float logit_scale, float softcap, bool cap) {
  if (cap) return {kLog2e, 1.0f, logit_scale / softcap, softcap, 1.0f / softcap};
  return {logit_scale * kLog2e, logit_scale, 0.0f, 0.0f, 0.0f};
}

template <bool CAP>
FASTFT_DEVICE float cap(float x, const Units& u) {
  return CAP ? u.softcap * tanhf(x * u.inner) : x;
}

// exp(x - top), both elements. The difference first: exact where it matters, and safe for logits of any size. (A fused
// x * log2e - c saves an instruction, but its error is 2^-24 |c|.)
FASTFT_DEVICE float2 exp_below(float2 x, float top, const Units& u) {
  const float2 t = mul2(add2(x, both(-top)), both(u.log2e));
  return {ex2(t.x), ex2(t.y)};
}
FASTFT_DEVICE float exp_below(float x, float top, const Units& u) { return ex2((x - top) * u.log2e); }
FASTFT_DEVICE float finite_or_zero(float top) { return top == -INFINITY ? 0.0f : top; }  // -inf - -inf would be NaN

struct RowSums {
  float top, sum, total;  // largest x, sum of exp(x - top), sum of x (for label smoothing)
};

// The logits of N packs of a thread, LANES packs apart, join its sums.
template <class T, int N, int LANES, bool SMOOTH, bool CAP>
FASTFT_DEVICE void add_packs(const unsigned char* at, RowSums& s, const Units& u) {
  uint4 w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = reinterpret_cast<const uint4*>(at)[k * LANES];
  const float top = max_nan(s.top, cap<CAP>(Words<T>::largest(w), u)), from = finite_or_zero(top);
  float2 sum[2] = {{s.sum * exp_below(s.top, from, u), 0.0f}, {0.0f, 0.0f}}, total = {s.total, 0.0f};
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int p = 0; p < Words<T>::pairs; ++p) {
      float2 x = Words<T>::get(w[k], p);
      if (CAP) x = {cap<CAP>(x.x, u), cap<CAP>(x.y, u)};
      if (SMOOTH) total = add2(total, x);
      sum[p % 2] = add2(sum[p % 2], exp_below(x, from, u));
    }
  }
  sum[0] = add2(sum[0], sum[1]);
  s = {top, sum[0].x + sum[0].y, total.x + total.y};
}

FASTFT_DEVICE void add_one(RowSums& s, float x, const Units& u) {
  const float top = max_nan(s.top, x), from = finite_or_zero(top);
  s = {top, s.sum * exp_below(s.top, from, u) + exp_below(x, from, u), s.total + x};
}

struct Gradient {
  float top, factor, smooth, of_target;  // d = exp(x - top) * factor - smooth; at the target less of_target
};

// The logits of N packs of a thread become gradients, in place.
template <class T, int N, int LANES, bool SMOOTH, bool CAP>
FASTFT_DEVICE void to_gradients(unsigned char* at, const Gradient& g, const Units& u) {
  uint4 w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = reinterpret_cast<const uint4*>(at)[k * LANES];
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (int p = 0; p < Words<T>::pairs; ++p) {
      float2 x = Words<T>::get(w[k], p), t = {0.0f, 0.0f};
      if (CAP) {
        t = {tanhf(x.x * u.inner), tanhf(x.y * u.inner)};
        x = mul2(t, both(u.softcap));
      }
      const float2 e = exp_below(x, g.top, u);
      float2 d = SMOOTH ? fma2(e, both(g.factor), both(-g.smooth)) : mul2(e, both(g.factor));
      if (CAP) d = mul2(d, fma2(t, {-t.x, -t.y}, both(1.0f)));
      Words<T>::put(w[k], p, d);
    }
    reinterpret_cast<uint4*>(at)[k * LANES] = w[k];
  }
}

template <bool CAP>
FASTFT_DEVICE float one_gradient(float x, bool target, const Gradient& g, const Units& u) {
  float d = exp_below(x, g.top, u) * g.factor - g.smooth;
  if (target) d -= g.of_target;  // in fp32, before rounding
  return CAP ? d * fmaf(x * -u.of, x * u.of, 1.0f) : d;
}

}  // namespace fastft::cuda::bulk
