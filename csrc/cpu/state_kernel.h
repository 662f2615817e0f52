// 8-bit state: blocks of 256 small floats with a power of two for their scale, as fastft/ops/lowbyte.py defines them. Included once per
// instruction set, inside that ISA's namespace.

// exp_avg: a sign and codes of 14 binades above 8 steps of 2^-17; exp_avg_sq: codes of 30 binades above 8 steps of 2^-33.
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

// |x| rounded to 3 mantissa bits: what the scale is taken from
FASTFT_INLINE I rounded_bits(V x, I random) { return iand(iadd(bits(abs(x)), shift_left<4>(random)), set1i(0xfff00000u)); }

template <bool kSigned>
FASTFT_INLINE I encode(V x, I random, V inverse_scale) {
  const V scaled = abs(x) * inverse_scale;
  const V low = set1(Code<kSigned>::kLow);
  const V below = floats(pick_less(scaled, low, bits(scaled), bits(low)));
  const I steps = truncate(below * set1(Code<kSigned>::kPerStep) + to_float(random) * set1(0x1p-16f));
  const I above = isub(shift_right<20>(iadd(bits(scaled), shift_left<4>(random))), set1i(Code<kSigned>::kOffset));
  const I code = pick_less(scaled, low, steps, above);
  if (kSigned) return ior(code, shift_left<7>(shift_right<31>(bits(x))));
  return imax(code, imin(bits(abs(x)), set1i(1)));  // never 0 unless x is
}

struct BlockScale {
  float scale, inverse;
  bool broken;  // NaN, Inf or beyond 2^126: the whole block reads as NaN
};

// The power of two at or above the largest of the rounded numbers. At least 2^-93, so that no code is a denormal.
FASTFT_INLINE BlockScale block_scale(I tops) {
  const std::uint32_t top = reduce_max(tops);
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
