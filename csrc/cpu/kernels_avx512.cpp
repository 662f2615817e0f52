// The kernels for one instruction set. All names but the table are local to this file or in its own namespace, so that
// the linker cannot merge code for one CPU into the path of another.
#include "simd_avx512.h"

#include "kernels.h"

namespace fastft::cpu {
namespace avx512 {
namespace {
#include "vector_math.h"
#include "random_kernel.h"
#include "state_kernel.h"
#include "adamw_kernel.h"
#include "cross_entropy_kernel.h"
#include "sum_squares_kernel.h"
#include "decoder_kernel.h"
#include "attention_kernel.h"
}  // namespace
}  // namespace avx512

extern const Kernels kernels_avx512 = {
    "avx512",
    {FASTFT_ADAMW(avx512, float, nearest), FASTFT_ADAMW(avx512, bf16, nearest), FASTFT_ADAMW(avx512, bf16, stochastic),
     FASTFT_ADAMW(avx512, bf16, remainder)},
    {avx512::ce_stats<float>, avx512::ce_stats<bf16>},
    {avx512::ce_grad<float>, avx512::ce_grad<bf16>},
    {avx512::sum_squares<float>, avx512::sum_squares<bf16>},
    avx512::stream_chunk,
    {avx512::rms_forward<float>, avx512::rms_forward<bf16>},
    {avx512::rms_backward<float>, avx512::rms_backward<bf16>},
    {avx512::rope<float>, avx512::rope<bf16>},
    {avx512::gated_forward<float>, avx512::gated_forward<bf16>},
    {avx512::gated_backward<float>, avx512::gated_backward<bf16>},
    avx512::attention_scratch,
    {avx512::attention_forward<float>, avx512::attention_forward<bf16>},
    {avx512::attention_backward<float>, avx512::attention_backward<bf16>},
};

}  // namespace fastft::cpu
