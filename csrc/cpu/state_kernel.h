// 8-bit state: blocks of 256 small floats with a power of two for their scale, as fastft/ops/quantized_state.py defines
// them. Included once per instruction set, inside that ISA's namespace.

// exp_avg: a sign and codes of 14 binades above 8 steps of 2^-17; exp_avg_sq: codes of 30 binades above 8 steps of
// 2^-33.
template <bool kSigned>
struct Code {
  static constexpr float kLow = kSigned ? 0x1p-14f : 0x1p-30f;  // below: steps
  static constexpr float kStep = kLow / 8;
  static constexpr float kPerStep = 1.0f / kStep;
  static constexpr std::uint32_t kOffset = (kSigned ? 127 - 14 - 1 : 127 - 30 - 1) << 3;
};

template <bool kSigned>
FASTFT_INLINE V decode(I code, V scale) {
  const I magnitude = kSigned ? iand(code, set1i(0x7f)) : code;
  const V few = to_float(magnitude);
  const V steps = few * set1(Code<kSigned>::kStep);
  const I above = shift_left<20>(iadd(magnitude, set1i(Code<kSigned>::kOffset)));
  const V x = floats(pick_less(few, set1(8.0f), bits(steps), above)) * scale;
  return kSigned ? floats(ior(bits(x), shift_left<24>(iand(code, set1i(0x80))))) : x;
}

template <bool kSigned>
FASTFT_INLINE I encode(V x, I random, V inverse_scale) {  // random: 16 bits, shifted left by 4; x >= 0 unless kSigned
  const V scaled = (kSigned ? abs(x) : x) * inverse_scale;
  const I steps =
      truncate(fma(scaled, set1(Code<kSigned>::kPerStep), to_float(random) * set1(0x1p-20f)));  // the product is exact
  const I above = isub(shift_right<20>(iadd(bits(scaled), random)), set1i(Code<kSigned>::kOffset));
  const I code = pick_less(scaled, set1(Code<kSigned>::kLow), steps, above);
  if (kSigned) return ior(code, iand(shift_right<24>(bits(x)), set1i(0x80)));
  return imax(code, imin(bits(x), set1i(1)));  // never 0 unless x is
}

struct BlockScale {
  float scale, inverse;
  bool broken;  // NaN, Inf or beyond 2^126: the whole block reads as NaN
};

// tops: the largest |x| of each lane, as bits with the random number added; the code's 3 mantissa bits and above are
// the rounded number. The scale is the power of two at or above the largest of these. At least 2^-93, so that no code
// is a denormal.
FASTFT_INLINE BlockScale block_scale(I tops) {
  const std::uint32_t top = reduce_max(tops) & 0xfff00000u;
  std::uint32_t scale = (top + 0x7fffffu) & 0x7f800000u;
  if (scale < 34u << 23) scale = 34u << 23;
  const bool broken = top > 253u << 23;
  if (broken) scale = 0x7fc00000u;
  const std::uint32_t inverse = broken ? 0 : (254u << 23) - scale;
  BlockScale result{};
  __builtin_memcpy(&result.scale, &scale, 4);
  __builtin_memcpy(&result.inverse, &inverse, 4);
  result.broken = broken;
  return result;
}
