// AdamW on the CPU: cuts the tensors into pieces of equal work and runs them on all threads.
#include "fastft/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fastft {
namespace {

// 16384 elements are 64 KiB per fp32 array: long enough for the hardware prefetcher, and 1e5 pieces for 2e9 parameters.
constexpr std::int64_t kPiece = 16384;
static_assert(kPiece % kStateBlock == 0, "a piece begins where a block of 8-bit state does");

struct Piece {
  std::int64_t tensor;
  std::int64_t offset;
  std::int64_t n;
};

// Pieces, and bounds of groups of neighbouring pieces that hold about kPiece elements together, so that a model of
// thousands of tiny tensors costs as little scheduling as one flat tensor.
void cut(const AdamWTensor* tensors, std::size_t count, std::vector<Piece>& pieces, std::vector<std::int64_t>& groups) {
  std::int64_t filled = 0;
  groups.push_back(0);
  for (std::size_t t = 0; t < count; ++t) {
    for (std::int64_t at = 0; at < tensors[t].numel; at += kPiece) {
      const std::int64_t n = std::min(kPiece, tensors[t].numel - at);
      if (filled > 0 && filled + n > kPiece) {
        groups.push_back(static_cast<std::int64_t>(pieces.size()));
        filled = 0;
      }
      pieces.push_back({static_cast<std::int64_t>(t), at, n});
      filled += n;
    }
  }
  if (filled > 0) groups.push_back(static_cast<std::int64_t>(pieces.size()));
}

cpu::AdamWScalars scalars(const AdamWOptions& o, double step) {
  const double lr = o.lr_ptr ? *o.lr_ptr : o.lr;
  const float scale = o.grad_scale ? *o.grad_scale : 1.0f;
  cpu::AdamWScalars s{};
  s.grad_factor = o.maximize ? -scale : scale;
  s.decay = o.decoupled ? static_cast<float>(1.0 - lr * o.weight_decay) : 1.0f;
  s.l2 = o.decoupled ? 0.0f : static_cast<float>(o.weight_decay);
  s.beta1 = static_cast<float>(o.beta1);
  s.beta2 = static_cast<float>(o.beta2);
  s.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);  // in float64: 1 - 0.999f is off by 1.3e-5
  s.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  s.inv_sqrt_bc2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)));
  s.eps = static_cast<float>(o.eps);
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(o.beta1, step)));
  s.random = random_base(o.seed, static_cast<std::uint32_t>(step));
  return s;
}

template <class T>
T* advance(T* p, std::int64_t n) {
  return p ? p + n : nullptr;
}

void* advance(const void* p, std::int64_t size, std::int64_t n) {
  return p ? const_cast<char*>(static_cast<const char*>(p)) + n * size : nullptr;
}

std::int64_t size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

std::int64_t size(StateStore state) { return state == StateStore::f32 ? 4 : state == StateStore::bf16 ? 2 : 1; }

cpu::AdamWChunk chunk(const AdamWTensor& t, const AdamWOptions& o, std::int64_t at, std::int64_t n) {
  const std::int64_t param = size(o.param_dtype), state = size(o.state_store), block = at / kStateBlock;
  return {advance(t.param, param, at),
          advance(t.grad, size(o.grad_dtype), at),
          advance(t.exp_avg, state, at),
          advance(t.exp_avg_sq, state, at),
          advance(t.max_exp_avg_sq, state, at),
          advance(t.copy, at),
          advance(t.remainder, at),
          advance(t.exp_avg_scale, block),
          advance(t.exp_avg_sq_scale, block),
          n,
          t.offset + at};
}

}  // namespace

void adamw_cpu(const AdamWTensor* tensors, std::size_t count, const AdamWOptions& o, int num_threads) {
  if (o.found_inf && *o.found_inf != 0.0f) return;
  const int store = o.param_dtype == DType::f32 ? 0 : 1 + static_cast<int>(o.param_store);
  const cpu::AdamWFn fn = cpu::kernels().adamw[store][static_cast<int>(o.grad_dtype)][static_cast<int>(o.state_store)];

  std::vector<cpu::AdamWScalars> per_tensor(count);
  for (std::size_t t = 0; t < count; ++t) {
    const bool same = t > 0 && *tensors[t].step == *tensors[t - 1].step;  // pow() twice per tensor would show
    per_tensor[t] = same ? per_tensor[t - 1] : scalars(o, static_cast<double>(*tensors[t].step) + 1.0);
  }
  std::vector<Piece> pieces;
  std::vector<std::int64_t> groups;
  cut(tensors, count, pieces, groups);

  const std::int64_t group_count = static_cast<std::int64_t>(groups.size()) - 1;
  cpu::for_each_stealing(group_count, cpu::thread_count(num_threads), [&](std::int64_t g) {
    for (std::int64_t i = groups[g]; i < groups[g + 1]; ++i) {
      const Piece& p = pieces[i];
      fn(chunk(tensors[p.tensor], o, p.offset, p.n), per_tensor[p.tensor]);
    }
  });
  for (std::size_t t = 0; t < count; ++t) *tensors[t].step += 1.0f;
}

}  // namespace fastft
