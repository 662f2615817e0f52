// The kernels for one instruction set. All names but the table are local to this file or in its own namespace, so that
// the linker cannot merge code for one CPU into the path of another.
#include "simd_scalar.h"

#include "kernels.h"

namespace fastft::cpu {
namespace scalar {
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
}  // namespace scalar

extern const Kernels kernels_scalar = {
    "scalar",
    {FASTFT_ADAMW(scalar, float, nearest), FASTFT_ADAMW(scalar, bf16, nearest), FASTFT_ADAMW(scalar, bf16, stochastic),
     FASTFT_ADAMW(scalar, bf16, remainder)},
    {scalar::ce_stats<float>, scalar::ce_stats<bf16>},
    {scalar::ce_grad<float>, scalar::ce_grad<bf16>},
    {scalar::sum_squares<float>, scalar::sum_squares<bf16>},
    scalar::stream_chunk,
    {scalar::rms_forward<float>, scalar::rms_forward<bf16>},
    {scalar::rms_backward<float>, scalar::rms_backward<bf16>},
    {scalar::rope<float>, scalar::rope<bf16>},
    {scalar::gated_forward<float>, scalar::gated_forward<bf16>},
    {scalar::gated_backward<float>, scalar::gated_backward<bf16>},
    scalar::attention_scratch,
    {scalar::attention_forward<float>, scalar::attention_forward<bf16>},
    {scalar::attention_backward<float>, scalar::attention_backward<bf16>},
};

}  // namespace fastft::cpu
