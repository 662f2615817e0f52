// Element types. Only types live here: inline functions in a header shared by files compiled for different instruction
// sets would be merged by the linker, and AVX-512 code could then run on a CPU without it.
#pragma once

#include <cstdint>

namespace fastft {

enum class DType : int { f32 = 0, bf16 = 1 };

struct bf16 {
  std::uint16_t bits;
};

}  // namespace fastft
