// exp and tanh over V. Included once per instruction set, after simd_<isa>.h, inside that ISA's namespace.

// Below this, exp is a denormal: 0 here. Softmax terms of 1e-38 of the largest do not reach any fp32 sum.
constexpr float kExpLow = -87.3365f;

// exp(x) for x < 88, within 1.1 ulp (measured by csrc/tests). Cody-Waite reduction by ln 2 in two parts, then a degree-5 minimax polynomial
// (Cephes expf). -inf gives 0, NaN stays.
FASTFT_INLINE V exp(V x) {
  const V n = round(x * set1(1.44269504088896341f));
  V r = fnma(n, set1(0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return ldexp_above(p, n, x, kExpLow);
}

// tanh(x), NaN stays. Odd polynomial below 0.625 (Cephes tanhf), because (1 - t) / (1 + t) loses all relative precision near 0,
// where soft-capped logits mostly lie.
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
