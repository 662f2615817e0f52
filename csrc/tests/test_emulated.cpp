// The CUDA kernels, run on the CPU by emulate/cuda_runtime.h, against the CPU kernels (which test_<op>.cpp hold to
// float64).
#include <cuda_runtime.h>

#include "check.h"
#include "fastft/cross_entropy.h"
#include "fastft/sum_squares.h"

using fastft::bf16;
using fastft::DType;

namespace {

std::mt19937 random_bits(7);

struct Case {
  DType dtype;
  std::int64_t rows, vocab;
  int offset;                              // elements before the first logit: 16-byte alignment off
  int padding;                             // elements between rows
  bool in_place, forward_only, lse, full;  // full: cap, smoothing, weights, z-loss, scales
  int capability;
};

std::int64_t size_of(DType d) { return d == DType::f32 ? 4 : 2; }

float read(const std::vector<char>& data, DType d, std::int64_t i) {
  if (d == DType::f32) {
    float f;
    std::memcpy(&f, &data[static_cast<std::size_t>(4 * i)], 4);
    return f;
  }
  bf16 h;
  std::memcpy(&h, &data[static_cast<std::size_t>(2 * i)], 2);
  return check::widen(h);
}

void write(std::vector<char>& data, DType d, std::int64_t i, float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  if (d == DType::bf16) u >>= 16;
  std::memcpy(&data[static_cast<std::size_t>(size_of(d) * i)], &u, static_cast<std::size_t>(size_of(d)));
}

struct Result {
  std::vector<char> grad;
  std::vector<float> loss, lse;
  std::int64_t bad_row;
};

template <class Run>
Result run(const Case& c, std::vector<char> logits, const std::vector<std::int64_t>& target,
           const std::vector<float>& weight, const std::vector<float>& factor, const Run& kernel) {
  const std::int64_t stride = c.vocab + c.padding;
  Result r{std::vector<char>(logits.size(), 0x5a), std::vector<float>(c.rows, -1.0f), std::vector<float>(c.rows, -1.0f),
           -5};
  char* in = logits.data() + c.offset * size_of(c.dtype);
  char* out = c.in_place ? in : r.grad.data() + c.offset * size_of(c.dtype);
  fastft::CrossEntropyArgs a{};
  a.logits = in;
  a.dtype = c.dtype;
  a.rows = c.rows;
  a.vocab = c.vocab;
  a.logits_stride = a.grad_stride = stride;
  a.target = target.data();
  a.ignore_index = -100;
  a.logit_scale = 1.0;
  a.loss = r.loss.data();
  a.lse = c.lse ? r.lse.data() : nullptr;
  a.grad = c.forward_only ? nullptr : out;
  a.bad_row = &r.bad_row;
  if (c.full) {
    a.class_weight = weight.data();
    a.token_weight = factor.data();
    a.token_weight_stride = 1;
    a.grad_scale = factor.data();
    a.label_smoothing = 0.1;
    a.z_loss = 1e-3;
    a.softcap = 5.0;
    a.logit_scale = 0.7;
  }
  kernel(a);
  if (c.in_place) r.grad = logits;
  return r;
}

void compare(const Case& c) {
  const std::int64_t stride = c.vocab + c.padding, total = c.offset + c.rows * stride;
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<char> logits(static_cast<std::size_t>(total * size_of(c.dtype)), 0x5a);
  for (std::int64_t i = 0; i < total; ++i) write(logits, c.dtype, i, normal(random_bits));
  std::vector<std::int64_t> target(c.rows);
  for (std::int64_t i = 0; i < c.rows; ++i)
    target[i] = static_cast<std::int64_t>(random_bits() % static_cast<unsigned long long>(c.vocab));
  if (c.rows > 2) target[1] = -100;
  if (c.rows > 3) {
    target[2] = c.vocab;  // out of range
    for (std::int64_t i = 0; i < c.vocab; ++i)
      write(logits, c.dtype, c.offset + 3 * stride + i, i % 3 ? -INFINITY : 1.0f);
  }
  std::vector<float> weight(c.vocab), factor(c.rows);
  for (float& w : weight) w = 0.5f + static_cast<float>(random_bits() % 100) / 100.0f;
  for (float& f : factor) f = 0.5f + static_cast<float>(random_bits() % 100) / 100.0f;

  emulate::compute_capability = c.capability;
  const Result cpu = run(c, logits, target, weight, factor, [](const auto& a) { fastft::cross_entropy_cpu(a, 1); });
  const Result gpu =
      run(c, logits, target, weight, factor, [](const auto& a) { fastft::cross_entropy_cuda(a, 0, nullptr); });
  const auto where = [&] {
    static char text[160];
    std::snprintf(text, sizeof text, "dtype %d, %lld x %lld, offset %d, padding %d, in place %d, full %d, cc %d",
                  static_cast<int>(c.dtype), static_cast<long long>(c.rows), static_cast<long long>(c.vocab), c.offset,
                  c.padding, c.in_place, c.full, c.capability);
    return text;
  };
  const auto close = [](float x, float y, float scale, float relative) {
    return x == y || (x != x && y != y) || std::fabs(x - y) <= relative * std::fabs(y) + 1e-6f * scale;
  };
  CHECK(cpu.bad_row == gpu.bad_row, "%s: bad row %lld, not %lld", where(), static_cast<long long>(gpu.bad_row),
        static_cast<long long>(cpu.bad_row));
  for (std::int64_t i = 0; i < c.rows; ++i) {
    CHECK(close(gpu.loss[i], cpu.loss[i], 10.0f, 2e-6f), "%s: loss of row %lld %.9g, not %.9g", where(),
          static_cast<long long>(i), gpu.loss[i], cpu.loss[i]);
    CHECK(close(gpu.lse[i], cpu.lse[i], 10.0f, 2e-6f), "%s: lse of row %lld %.9g, not %.9g", where(),
          static_cast<long long>(i), gpu.lse[i], cpu.lse[i]);
  }
  const float relative = c.dtype == DType::f32 ? 2e-5f : 1.0f / 128;
  for (std::int64_t i = 0; i < total; ++i) {  // also what lies between and before the rows, which nobody may touch
    const float x = read(gpu.grad, c.dtype, i), y = read(cpu.grad, c.dtype, i);
    CHECK(close(x, y, 1.0f, relative), "%s: gradient at %lld %.9g, not %.9g", where(), static_cast<long long>(i), x, y);
  }
}

void sums() {
  for (std::size_t count : {0, 300}) {
    std::vector<std::vector<float>> data;
    std::vector<fastft::SumSquaresTensor> list;
    for (std::size_t t = 0; t < count; ++t) {
      data.emplace_back(t == 7 ? 70001 : t % 13);
      for (float& x : data.back()) x = static_cast<float>(random_bits() % 1000) - 500.0f;
    }
    for (const auto& d : data) list.push_back({d.data(), static_cast<std::int64_t>(d.size())});
    std::vector<double> scratch(fastft::kSumSquaresScratch, 1e300);
    double cpu = 0.0, gpu = -1.0;
    fastft::sum_squares_cpu(list.data(), count, DType::f32, &cpu, 1);
    fastft::sum_squares_cuda(list.data(), count, DType::f32, &gpu, scratch.data(), 0, nullptr);
    CHECK(std::fabs(cpu - gpu) <= 1e-12 * cpu, "sum of squares of %zu tensors: %.17g, not %.17g", count, gpu, cpu);
  }
}

}  // namespace

int main() {
  check::skip_unless_runnable();
  const std::int64_t lengths[] = {1, 2, 7, 8, 9, 33, 1000, 4099, 11260, 11270};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t vocab : lengths) {
      for (const bool full : {false, true}) {
        const std::int64_t rows = vocab > 5000 ? 3 : 5;
        compare({dtype, rows, vocab, 0, 0, false, false, true, full, 9});
        if (vocab > 5000 && full) continue;
        compare({dtype, rows, vocab, 3, 5, true, false, false, full, 9});
        compare({dtype, rows, vocab, 1, 0, true, false, true, full, 8});
      }
    }
    compare({dtype, 4, 1000, 0, 1, false, true, true, true, 9});
    compare({dtype, 2, 50257, 0, 0, true, false, false, false, 9});    // 8 blocks a row
    compare({dtype, 2, 128256, 0, 0, false, false, true, false, 9});   // 16
    compare({dtype, 2, 262144, 0, 0, false, false, false, false, 9});  // 16 full blocks: 32 logits of every thread
    compare({dtype, 2, 262208, 0, 0, false, false, false, false, 9});  // more than fits: two passes
  }
  sums();
  return check::finish();
}
