// bfloat16 conversion for emulate/cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

inline std::uint16_t __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return static_cast<std::uint16_t>((u | 0x400000u) >> 16);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline unsigned short __bfloat16_as_ushort(std::uint16_t x) { return x; }
