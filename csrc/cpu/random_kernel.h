// Random numbers of a vector of elements, and roundings that use them. Included once per instruction set, inside that
// ISA's namespace.

struct RandomKeys {
  I key0, key0_after, key1;
  std::uint32_t low;  // lower 32 bits of the first element's index
  std::int64_t wrap;  // elements before those bits start again at 0, with key0_after
};

FASTFT_INLINE RandomKeys random_keys(std::uint32_t base, std::int64_t position) {
  const std::uint32_t low = static_cast<std::uint32_t>(position);
  const std::uint32_t high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(position) >> 32);
  return {set1i(random_key0(base, high)), set1i(random_key0(base, high + 1)), set1i(random_key1(base)), low,
          (std::int64_t{1} << 32) - low};
}

// 16 bits for the param above 16 bits for exp_avg, of the elements from i on
FASTFT_INLINE I random_first(const RandomKeys& k, std::int64_t i) {
  I key0 = k.key0;
  if (i + kWidth > k.wrap) key0 = pick_first(i < k.wrap ? k.wrap - i : 0, k.key0, k.key0_after);
  I x = ixor(iadd(set1i(k.low + static_cast<std::uint32_t>(i)), lane_numbers()), key0);
  x = iadd(imul(ixor(x, shift_right<16>(x)), set1i(kMix1)), k.key1);
  x = imul(ixor(x, shift_right<15>(x)), set1i(kMix2));
  return ixor(x, shift_right<16>(x));
}

// The upper 16 bits are for exp_avg_sq
FASTFT_INLINE I random_second(I first) { return imul(first, set1i(kSecond)); }

FASTFT_INLINE I low16(I x) { return iand(x, set1i(0xffff)); }

// bf16 in the lower 16 bits, rounded up with the probability that keeps the mean; random < 2^16. NaN stays NaN.
FASTFT_INLINE I round_stochastic(V x, I random) {
  const I u = bits(x);
  return pick_nan(x, shift_right<16>(ior(u, set1i(0x400000))), shift_right<16>(iadd(u, random)));
}

// The nearest bf16 in the lower 16 bits, ties away from zero. Its remainder is the lower half of x, as a signed number.
FASTFT_INLINE I upper_half(V x) {
  const I u = bits(x);
  return pick_nan(x, shift_right<16>(ior(u, set1i(0x400000))), shift_right<16>(iadd(u, set1i(0x8000))));
}
FASTFT_INLINE I lower_half(V x) { return pick_nan(x, set1i(0), bits(x)); }
FASTFT_INLINE V join(V upper, I lower) { return floats(iadd(bits(upper), lower)); }
