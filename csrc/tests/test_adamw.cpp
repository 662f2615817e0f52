// adamw_cpu against the formulas in float64, over dtypes, options, odd sizes and unaligned tensors.
#include "fastft/adamw.h"

#include "check.h"

using check::Array;
using fastft::DType;

namespace {

constexpr std::int64_t kSizes[] = {1, 0, 3, 15, 16, 17, 507, 16384, 16385, 50001};
constexpr int kCount = sizeof(kSizes) / sizeof(kSizes[0]);

struct Case {
  DType param, grad;
  bool amsgrad, copy, decoupled, maximize, scaled;
  double beta1;
  std::int64_t offset;  // elements off alignment
};

struct Tensor {
  Array param, grad;
  std::vector<float> m, v, vmax;
  std::vector<fastft::bf16> copy;
  float step;

  Tensor(std::int64_t n, const Case& c, float steps)
      : param(check::normal(n, 1.0f), c.param, c.offset), grad(check::normal(n, 0.1f), c.grad, c.offset),
        m(check::normal(n, 0.05f)), v(check::normal(n, 0.01f)), vmax(check::normal(n, 0.01f)),
        copy(static_cast<std::size_t>(n)), step(steps) {
    for (float& x : v) x = std::fabs(x);
    for (float& x : vmax) x = std::fabs(x);
  }
};

struct Truth {
  double p, m, v, vmax;
  double rate;     // what m is multiplied by
  double v_error;  // what float32 may be off by, also where the gradient and the L2 term cancel
};

constexpr double kLr = 1e-2, kBeta2 = 0.999, kEps = 1e-8, kDecay = 0.1, kScale = 0.37, kHalfUlp = 6e-8;

Truth truth(Tensor& t, std::int64_t i, const Case& c) {
  const double step = t.step + 1.0;
  double p = t.param.get(i), g = t.grad.get(i);
  if (c.scaled) g *= static_cast<float>(kScale);
  if (c.maximize) g = -g;
  const double g_error = 2 * kHalfUlp * (std::fabs(g) + (c.decoupled ? 0 : kDecay * std::fabs(p)));
  if (c.decoupled) p -= kLr * kDecay * p;
  else g += kDecay * p;
  Truth r{};
  r.m = c.beta1 * t.m[i] + (1 - c.beta1) * g;
  r.v = kBeta2 * t.v[i] + (1 - kBeta2) * g * g;
  r.v_error = 4 * kHalfUlp * r.v + (1 - kBeta2) * (2 * std::fabs(g) + g_error) * g_error;
  r.vmax = std::fmax(t.vmax[i], r.v);
  const double denom = std::sqrt(c.amsgrad ? r.vmax : r.v) / std::sqrt(1 - std::pow(kBeta2, step)) + kEps;
  r.rate = kLr / (1 - std::pow(c.beta1, step)) / denom;
  r.p = p - r.rate * r.m;
  return r;
}

fastft::AdamWTensor view(Tensor& t, std::int64_t n, const Case& c) {
  return {t.param.data(), t.grad.data(), t.m.data(), t.v.data(), c.amsgrad ? t.vmax.data() : nullptr,
          c.copy ? t.copy.data() : nullptr, nullptr, nullptr, nullptr, &t.step, n, 0};
}

void compare(Tensor& t, std::int64_t i, const Truth& want, const Case& c, std::int64_t n) {
  const double eps = kHalfUlp;
  const double m_scale = std::fabs(want.m) + 0.2, v_scale = want.v + 1e-6;
  CHECK(std::fabs(t.m[i] - want.m) <= 3 * eps * m_scale, "m %g want %g, n %lld", t.m[i], want.m, (long long)n);
  CHECK(std::fabs(t.v[i] - want.v) <= 7 * eps * v_scale, "v %g want %g, n %lld", t.v[i], want.v, (long long)n);
  if (c.amsgrad) CHECK(std::fabs(t.vmax[i] - want.vmax) <= 4 * eps * want.vmax + 1e-12, "vmax %g want %g", t.vmax[i], want.vmax);
  const double update = std::fmax(2.0, want.rate * m_scale);  // above 2 where v and the gradient are both next to 0
  const double of_v = want.rate * std::fabs(want.m) * 0.5 * want.v_error / want.v;
  const double tolerance = 4 * eps * (std::fabs(want.p) + update) + of_v + (c.param == DType::f32 ? 0 : 0.00391 * std::fabs(want.p) + 1e-6);
  CHECK(std::fabs(t.param.get(i) - want.p) <= tolerance, "p %g want %g, n %lld i %lld", t.param.get(i), want.p, (long long)n, (long long)i);
  if (c.copy && c.param == DType::f32) {
    CHECK(t.copy[i].bits == check::nearest_bf16(t.param.get(i)).bits, "copy of %g", t.param.get(i));
  }
}

void run(const Case& c) {
  std::vector<Tensor> tensors;
  for (int k = 0; k < kCount; ++k) tensors.emplace_back(kSizes[k], c, static_cast<float>(k % 3 * 10));
  std::vector<std::vector<Truth>> want(kCount);
  std::vector<fastft::AdamWTensor> views;
  for (int k = 0; k < kCount; ++k) {
    for (std::int64_t i = 0; i < kSizes[k]; ++i) want[k].push_back(truth(tensors[k], i, c));
    views.push_back(view(tensors[k], kSizes[k], c));
  }
  const float scale = static_cast<float>(kScale), found = 0.0f, lr = static_cast<float>(kLr);
  fastft::AdamWOptions o{c.param, c.grad, fastft::ParamStore::nearest, fastft::StateStore::f32, 0, kLr, nullptr, c.beta1, kBeta2, kEps, kDecay, c.decoupled, c.maximize,
                         c.scaled ? &scale : nullptr, &found};
  const float overflow = 1.0f;
  o.found_inf = &overflow;
  const std::vector<Tensor> before = tensors;
  fastft::adamw_cpu(views.data(), views.size(), o, 2);
  for (int k = 0; k < kCount; ++k) {  // found_inf: nothing at all is written
    CHECK(tensors[k].param.bytes == before[k].param.bytes && tensors[k].m == before[k].m && tensors[k].v == before[k].v &&
              tensors[k].step == before[k].step, "found_inf, tensor %d", k);
  }
  o.found_inf = &found;
  if (c.scaled) o.lr = 123.0, o.lr_ptr = &lr;
  fastft::adamw_cpu(views.data(), views.size(), o, 2);
  for (int k = 0; k < kCount; ++k) {
    CHECK(tensors[k].step == before[k].step + 1.0f, "step %g", tensors[k].step);
    for (std::int64_t i = 0; i < kSizes[k]; ++i) compare(tensors[k], i, want[k][i], c, kSizes[k]);
  }
}

// The result may not depend on how many threads share the work.
void run_threads() {
  const Case c{DType::f32, DType::bf16, false, true, true, false, false, 0.9, 1};
  Tensor one(100003, c, 4.0f);
  Tensor three = one;
  const fastft::AdamWOptions o{c.param, c.grad, fastft::ParamStore::nearest, fastft::StateStore::f32, 0, kLr, nullptr, c.beta1, kBeta2, kEps, kDecay, true, false, nullptr, nullptr};
  const fastft::AdamWTensor a = view(one, 100003, c), b = view(three, 100003, c);
  fastft::adamw_cpu(&a, 1, o, 1);
  fastft::adamw_cpu(&b, 1, o, 3);
  CHECK(one.param.bytes == three.param.bytes && one.m == three.m && one.v == three.v, "1 and 3 threads differ");
}

}  // namespace

int main() {
  check::skip_unless_runnable();
  for (int bits = 0; bits < 128; ++bits) {
    const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
    run({bit(0) ? DType::bf16 : DType::f32, bit(1) ? DType::bf16 : DType::f32, bit(2), bit(3), bit(4), bit(5), bit(6),
         bits % 5 == 0 ? 0.0 : 0.9, bits % 3});
  }
  run_threads();
  return check::finish();
}
