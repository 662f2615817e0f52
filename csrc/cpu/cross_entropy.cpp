// Softmax cross-entropy on the CPU. Per row two loops (kernels.h): the first reads the row from memory and leaves
// exp(x - max) in an L2-sized fp32 scratch row, the second scales that into the gradient. Between them, a handful of
// float64 scalars. A row is always one thread's work, so results do not depend on the number of threads.
#include "fastft/cross_entropy.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kernels.h"

namespace fastft {
namespace {

void put(void* row, std::int64_t i, float x, float) { static_cast<float*>(row)[i] = x; }

void put(void* row, std::int64_t i, float x, bf16) {
  union {
    float value;
    std::uint32_t bits;
  } u{x};
  const bool nan = x != x;
  const std::uint32_t rounded = u.bits + 0x7fffu + ((u.bits >> 16) & 1u);
  static_cast<bf16*>(row)[i].bits = static_cast<std::uint16_t>((nan ? (u.bits | 0x400000u) : rounded) >> 16);
}

// Asks for 2 MiB pages behind a big gradient, which is mostly fresh memory: 1024 x 32000 fp32 into new 4 KiB pages
// takes 31 ms, into new huge ones 14, into memory already there 9. Only advice; without support nothing changes.
void advise_huge_pages(void* start, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = 4096;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(start) + page - 1) / page * page;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(start) + bytes) / page * page;
  if (bytes >= (std::size_t{8} << 20)) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

template <class T>
void zero(void* row, std::int64_t n) {
  T* p = static_cast<T*>(row);
  for (std::int64_t i = 0; i < n; ++i) p[i] = T{};
}

struct Call {
  const CrossEntropyArgs& a;
  cpu::CeStatsFn stats;
  cpu::CeGradFn grad;
  double weight_total;  // of all classes; only label smoothing reads it

  // This thread's exps of one row. Kept between calls: fresh pages would cost more than the row.
  float* scratch() const {
    static thread_local std::vector<float> buffer;
    const std::int64_t blocks = (a.vocab + cpu::kCeBlock - 1) / cpu::kCeBlock;
    const std::size_t want = static_cast<std::size_t>(blocks * cpu::kCeBlockFloats) + 16;
    if (buffer.size() < want) buffer.resize(want);
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(buffer.data());
    return reinterpret_cast<float*>((start + 63) / 64 * 64);
  }
};

// One row; returns whether its target is in range or ignored.
template <class T>
bool run_row(const Call& call, std::int64_t i) {
  const CrossEntropyArgs& a = call.a;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* grad = a.grad ? static_cast<T*>(a.grad) + i * a.grad_stride : nullptr;
  const std::int64_t y = a.target[i];
  const bool ignored = y == a.ignore_index;
  const bool in_range = y >= 0 && y < a.vocab;
  const bool counts = in_range && !ignored;

  if (!counts && !a.lse) {  // the logits are not even read
    if (a.loss) a.loss[i] = ignored ? 0.0f : static_cast<float>(nan);
    if (grad) zero<T>(grad, a.vocab);
    return ignored;
  }

  const double s = a.label_smoothing;
  const cpu::CeLogits row{logits,
                          a.vocab,
                          static_cast<float>(a.logit_scale),
                          static_cast<float>(a.softcap),
                          s != 0.0 && counts,
                          a.class_weight,
                          counts ? y : -1,
                          grad && counts ? call.scratch() : nullptr};
  cpu::CeStats st = call.stats(row);
  if (st.sum == 0.0) st.sum = nan;  // every logit is -inf
  const double log_sum = std::log(st.sum);
  const double lse = st.max + log_sum;
  if (a.lse) a.lse[i] = static_cast<float>(lse);
  if (!counts) {
    if (a.loss) a.loss[i] = ignored ? 0.0f : static_cast<float>(nan);
    if (grad) zero<T>(grad, a.vocab);
    return ignored;
  }

  const double w_y = a.class_weight ? a.class_weight[y] : 1.0;
  const double token = a.token_weight ? a.token_weight[i * a.token_weight_stride] : 1.0;
  const double v = static_cast<double>(a.vocab);
  // (max - x) + log_sum, not lse - x: exact also where the loss is tiny beside lse.
  double loss = (1.0 - s) * w_y * ((static_cast<double>(st.max) - st.target) + log_sum) + a.z_loss * lse * lse;
  if (s != 0.0) loss += s / v * (call.weight_total * lse - st.weighted_sum);
  if (a.loss) a.loss[i] = static_cast<float>(token * loss);
  if (!grad) return true;

  // d loss / d x_c = p_c * of_p - (1-s) * w_y * [c == y] - s/V * w_c
  const double outer = token * (a.grad_scale ? a.grad_scale[i * a.grad_scale_stride] : 1.0) * a.logit_scale;
  const double of_p = (1.0 - s) * w_y + (s != 0.0 ? s / v * call.weight_total : 0.0) + 2.0 * a.z_loss * lse;
  const double p_y = std::exp(static_cast<double>(st.target) - st.max) / st.sum;
  const double g_y = p_y * of_p - (1.0 - s) * w_y - s / v * w_y;
  const double slope = 1.0 - static_cast<double>(st.target_tanh) * st.target_tanh;
  call.grad(row, {grad, st.max, outer * of_p / st.sum, static_cast<float>(outer * s / v)});
  put(grad, y, static_cast<float>(outer * g_y * slope), T{});
  return true;
}

}  // namespace

void cross_entropy_cpu(const CrossEntropyArgs& a, int num_threads) {
  const cpu::Kernels& k = cpu::kernels();
  const int type = static_cast<int>(a.dtype);
  double weight_total = static_cast<double>(a.vocab);
  if (a.class_weight && a.label_smoothing != 0.0) {
    weight_total = 0.0;
    for (std::int64_t c = 0; c < a.vocab; ++c) weight_total += a.class_weight[c];
  }
  if (a.grad && a.grad != a.logits && a.grad_stride == a.vocab) {
    advise_huge_pages(a.grad, static_cast<std::size_t>(a.rows * a.vocab) * (a.dtype == DType::f32 ? 4 : 2));
  }
  const Call call{a, k.ce_stats[type], k.ce_grad[type], weight_total};

  std::int64_t bad = std::numeric_limits<std::int64_t>::max();
  const std::int64_t per_task = a.vocab > 16384 ? 1 : 16384 / (a.vocab > 0 ? a.vocab : 1) + 1;
  const std::int64_t tasks = (a.rows + per_task - 1) / per_task;
  // Dynamic: ignored rows cost next to nothing, and they come in runs (prompts, padding).
#pragma omp parallel for schedule(dynamic) num_threads(cpu::thread_count(num_threads)) \
    reduction(min : bad) if (tasks > 1)
  for (std::int64_t t = 0; t < tasks; ++t) {
    const std::int64_t end = (t + 1) * per_task < a.rows ? (t + 1) * per_task : a.rows;
    for (std::int64_t i = t * per_task; i < end; ++i) {
      const bool ok = a.dtype == DType::f32 ? run_row<float>(call, i) : run_row<bf16>(call, i);
      if (!ok && i < bad) bad = i;
    }
  }
  if (a.bad_row) *a.bad_row = bad == std::numeric_limits<std::int64_t>::max() ? -1 : bad;
}

}  // namespace fastft
