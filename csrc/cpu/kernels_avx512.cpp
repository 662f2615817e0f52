// The kernels for one instruction set. All names but the table are local to this file or in its own namespace, so that
// the linker cannot merge code for one CPU into the path of another.
#include "simd_avx512.h"

#include "kernels.h"

namespace fastft::cpu {
namespace avx512 {
namespace {
#include "vector_math.h"
#include "adamw_kernel.h"
#include "cross_entropy_kernel.h"
#include "sum_squares_kernel.h"
}  // namespace
}  // namespace avx512

extern const Kernels kernels_avx512 = {
    "avx512",
    {{avx512::adamw_chunk<float, float>, avx512::adamw_chunk<float, bf16>},
     {avx512::adamw_chunk<bf16, float>, avx512::adamw_chunk<bf16, bf16>}},
    {avx512::ce_stats<float>, avx512::ce_stats<bf16>},
    {avx512::ce_grad<float>, avx512::ce_grad<bf16>},
    {avx512::sum_squares<float>, avx512::sum_squares<bf16>},
    avx512::stream_chunk,
};

}  // namespace fastft::cpu
