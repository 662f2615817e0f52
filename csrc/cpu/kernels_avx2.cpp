// The kernels for one instruction set. All names but the table are local to this file or in its own namespace, so that
// the linker cannot merge code for one CPU into the path of another.
#include "simd_avx2.h"

#include "kernels.h"

namespace fastft::cpu {
namespace avx2 {
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
}  // namespace avx2

extern const Kernels kernels_avx2 = {
    "avx2",
    {FASTFT_ADAMW(avx2, float, nearest), FASTFT_ADAMW(avx2, bf16, nearest), FASTFT_ADAMW(avx2, bf16, stochastic),
     FASTFT_ADAMW(avx2, bf16, remainder)},
    {avx2::ce_stats<float>, avx2::ce_stats<bf16>},
    {avx2::ce_grad<float>, avx2::ce_grad<bf16>},
    {avx2::sum_squares<float>, avx2::sum_squares<bf16>},
    avx2::stream_chunk,
    {avx2::rms_forward<float>, avx2::rms_forward<bf16>},
    {avx2::rms_backward<float>, avx2::rms_backward<bf16>},
    {avx2::rope<float>, avx2::rope<bf16>},
    {avx2::gated_forward<float>, avx2::gated_forward<bf16>},
    {avx2::gated_backward<float>, avx2::gated_backward<bf16>},
    avx2::attention_scratch,
    {avx2::attention_forward<float>, avx2::attention_forward<bf16>},
    {avx2::attention_backward<float>, avx2::attention_backward<bf16>},
};

}  // namespace fastft::cpu
