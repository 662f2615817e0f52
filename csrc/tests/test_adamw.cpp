// adamw_cpu against the formulas in float64, over dtypes, options, odd sizes and unaligned tensors.
#include "fastft/adamw.h"

#include "adamw_truth.h"
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
      : param(check::normal(n, 1.0f), c.param, c.offset),
        grad(check::normal(n, 0.1f), c.grad, c.offset),
        m(check::normal(n, 0.05f)),
        v(check::normal(n, 0.01f)),
        vmax(check::normal(n, 0.01f)),
        copy(static_cast<std::size_t>(n)),
        step(steps) {
    for (float& x : v) x = std::fabs(x);
    for (float& x : vmax) x = std::fabs(x);
  }
};

constexpr double kLr = 1e-2, kBeta2 = 0.999, kEps = 1e-8, kDecay = 0.1, kScale = 0.37;

fastft::AdamWTensor view(Tensor& t, std::int64_t n, const Case& c) {
  return {t.param.data(),
          t.grad.data(),
          t.m.data(),
          t.v.data(),
          c.amsgrad ? t.vmax.data() : nullptr,
          c.copy ? t.copy.data() : nullptr,
          nullptr,
          nullptr,
          nullptr,
          &t.step,
          n,
          0};
}

void compare(Tensor& t, std::int64_t i, const check::AdamWTruth& want, const Case& c, std::int64_t n) {
  const double least = 1e-37;  // below lie the subnormals
  CHECK(std::fabs(t.m[i] - want.m) <= want.m_error + least, "m %g want %g, n %lld", t.m[i], want.m, (long long)n);
  CHECK(std::fabs(t.v[i] - want.v) <= want.v_error + least, "v %g want %g, n %lld", t.v[i], want.v, (long long)n);
  if (c.amsgrad)
    CHECK(std::fabs(t.vmax[i] - want.vmax) <= want.v_error + least, "vmax %g want %g", t.vmax[i], want.vmax);
  const double tolerance =
      want.p_error + (c.param == DType::f32 ? 0 : std::ldexp(std::fabs(want.p) + want.p_error, -8)) + least;
  CHECK(std::fabs(t.param.get(i) - want.p) <= tolerance, "p %g want %g, n %lld i %lld", t.param.get(i), want.p,
        (long long)n, (long long)i);
  if (c.copy && c.param == DType::f32) {
    CHECK(t.copy[i].bits == check::nearest_bf16(t.param.get(i)).bits, "copy of %g", t.param.get(i));
  }
}

void run(const Case& c) {
  std::vector<Tensor> tensors;
  for (int k = 0; k < kCount; ++k) tensors.emplace_back(kSizes[k], c, static_cast<float>(k % 3 * 10));
  const float scale = static_cast<float>(kScale), found = 0.0f, lr = static_cast<float>(kLr);
  fastft::AdamWOptions o{c.param,
                         c.grad,
                         fastft::ParamStore::nearest,
                         fastft::StateStore::f32,
                         0,
                         kLr,
                         nullptr,
                         c.beta1,
                         kBeta2,
                         kEps,
                         kDecay,
                         c.decoupled,
                         c.maximize,
                         c.scaled ? &scale : nullptr,
                         &found};
  if (c.scaled) o.lr = 123.0, o.lr_ptr = &lr;
  std::vector<std::vector<check::AdamWTruth>> want(kCount);
  std::vector<fastft::AdamWTensor> views;
  for (int k = 0; k < kCount; ++k) {
    Tensor& t = tensors[k];
    for (std::int64_t i = 0; i < kSizes[k]; ++i) {
      want[k].push_back(
          check::adamw_truth({t.param.get(i), t.grad.get(i), t.m[i], t.v[i], t.vmax[i]}, o, t.step + 1.0, c.amsgrad));
    }
    views.push_back(view(t, kSizes[k], c));
  }
  const float overflow = 1.0f;
  o.found_inf = &overflow;
  const std::vector<Tensor> before = tensors;
  fastft::adamw_cpu(views.data(), views.size(), o, 2);
  for (int k = 0; k < kCount; ++k) {  // found_inf: nothing at all is written
    CHECK(tensors[k].param.bytes == before[k].param.bytes && tensors[k].m == before[k].m &&
              tensors[k].v == before[k].v && tensors[k].step == before[k].step,
          "found_inf, tensor %d", k);
  }
  o.found_inf = &found;
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
  const fastft::AdamWOptions o{c.param,
                               c.grad,
                               fastft::ParamStore::nearest,
                               fastft::StateStore::f32,
                               0,
                               kLr,
                               nullptr,
                               c.beta1,
                               kBeta2,
                               kEps,
                               kDecay,
                               true,
                               false,
                               nullptr,
                               nullptr};
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
