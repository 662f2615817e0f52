// exp and tanh over V. Included once per instruction set, after simd_<isa>.h, inside that ISA's namespace.

// Below this, exp is a denormal: 0 here. Softmax terms of 1e-38 of the largest do not reach any fp32 sum.
constexpr float kExpLow = -87.3365f;

// exp(x) for x < 88, within 1.2 ulp + 1.4e-8 |x|, relative (measured by csrc/tests/test_math.cpp); exactly 1 at 0. As
// 2^n * 2^f: the fused f = x * log2(e) - n rounds only once and near 0, so one constant does where exp's usual
// reduction by ln 2 needs two; x itself, a difference of logits, carries 6e-8 |x| of rounding already. Minimax
// polynomial of degree 6, 2e-9 relative on [-1/2, 1/2]. -inf gives 0, NaN stays.
FASTFT_INLINE V exp(V x) {
  const V log2e = set1(1.44269504088896341f);
  const V n = round(x * log2e);
  const V f = fms(x, log2e, n);
  V p = set1(1.535335904918611e-4f);
  p = fma(p, f, set1(1.3398876180872321e-3f));
  p = fma(p, f, set1(9.61843691766262e-3f));
  p = fma(p, f, set1(5.5503323674201965e-2f));
  p = fma(p, f, set1(2.4022647738456726e-1f));
  p = fma(p, f, set1(6.931471824645996e-1f));
  p = fma(p, f, set1(1.0f));
  return ldexp_above(p, n, x, kExpLow);
}

// tanh(x), NaN stays. Odd polynomial below 0.625 (Cephes tanhf), because (1 - t) / (1 + t) loses all relative precision
// near 0, where soft-capped logits mostly lie.
FASTFT_INLINE V tanh(V x) {
  const V a = abs(x);
  const V z = x * x;
  V p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const V small = fma(p * z, x, x);
  const V t = exp(a * set1(-2.0f));
  const V large = copysign((set1(1.0f) - t) / (set1(1.0f) + t), x);
  return select_less(a, set1(0.625f), small, large);
}
