// cross_entropy_cpu against the formulas in float64, over dtypes, options, odd shapes, strides and degenerate rows.
#include "fastft/cross_entropy.h"

#include "check.h"

using check::Array;
using fastft::DType;

namespace {

constexpr std::int64_t kIgnore = -100;

struct Case {
  DType dtype;
  std::int64_t rows, vocab, gap;  // gap: elements between rows
  bool weight, token, scaled, in_place;
  double smoothing, z_loss, softcap, logit_scale;
};

struct Data {
  Array logits, grad;
  std::vector<std::int64_t> target;
  std::vector<float> weight, token, scale, loss, lse;
  std::int64_t bad = 7;

  explicit Data(const Case& c)
      : logits(check::normal(c.rows * (c.vocab + c.gap), 4.0f), c.dtype, c.gap),
        grad(std::vector<float>(static_cast<std::size_t>(c.rows * (c.vocab + c.gap)), NAN), c.dtype, c.gap),
        target(static_cast<std::size_t>(c.rows)),
        weight(check::normal(c.vocab, 0.3f)),
        token(check::normal(c.rows, 1.0f)),
        scale(check::normal(c.rows, 1.0f)),
        loss(target.size(), 9.0f),
        lse(target.size(), 9.0f) {
    for (float& w : weight) w = std::fabs(w) + 0.5f;
    for (std::int64_t& y : target) y = std::uniform_int_distribution<std::int64_t>(0, c.vocab - 1)(check::rng());
    if (c.rows > 2) target[1] = kIgnore;
  }

  fastft::CrossEntropyArgs args(const Case& c) {
    return {logits.data(),
            c.dtype,
            c.rows,
            c.vocab,
            c.vocab + c.gap,
            target.data(),
            c.weight ? weight.data() : nullptr,
            c.token ? token.data() : nullptr,
            1,
            kIgnore,
            c.smoothing,
            c.z_loss,
            c.softcap,
            c.logit_scale,
            loss.data(),
            lse.data(),
            c.in_place ? logits.data() : grad.data(),
            c.vocab + c.gap,
            c.scaled ? scale.data() : nullptr,
            1,
            &bad};
  }
};

struct Truth {
  double loss, lse;
  std::vector<double> grad;
};

Truth truth(Data& d, const Case& c, std::int64_t i) {
  const std::int64_t v = c.vocab, y = d.target[i];
  std::vector<double> x(v), slope(v, 1.0);
  double top = -INFINITY, sum = 0.0, weights = 0.0, weighted = 0.0;
  for (std::int64_t k = 0; k < v; ++k) {
    x[k] = c.logit_scale * d.logits.get(i * (v + c.gap) + k);
    if (c.softcap != 0.0) {
      const double t = std::tanh(x[k] / c.softcap);
      x[k] = c.softcap * t;
      slope[k] = 1.0 - t * t;
    }
    top = std::fmax(top, x[k]);
  }
  for (std::int64_t k = 0; k < v; ++k) sum += std::exp(x[k] - top);
  Truth r{0.0, top + std::log(sum), std::vector<double>(v, 0.0)};
  if (y == kIgnore) return r;
  const auto w = [&](std::int64_t k) { return c.weight ? static_cast<double>(d.weight[k]) : 1.0; };
  const double s = c.smoothing, token = c.token ? d.token[i] : 1.0, outer = token * (c.scaled ? d.scale[i] : 1.0);
  for (std::int64_t k = 0; k < v; ++k) {
    weights += w(k);
    if (s != 0.0) weighted += w(k) * (r.lse - x[k]);  // 0 * inf at a masked class otherwise
  }
  r.loss = token * ((1 - s) * w(y) * (r.lse - x[y]) + s / v * weighted + c.z_loss * r.lse * r.lse);
  const double of_p = (1 - s) * w(y) + s / v * weights + 2 * c.z_loss * r.lse;
  for (std::int64_t k = 0; k < v; ++k) {
    const double p = std::exp(x[k] - r.lse);
    r.grad[k] = outer * c.logit_scale * slope[k] * (p * of_p - (k == y ? (1 - s) * w(y) : 0.0) - s / v * w(k));
  }
  return r;
}

void run(const Case& c) {
  Data d(c);
  std::vector<Truth> want;
  for (std::int64_t i = 0; i < c.rows; ++i) want.push_back(truth(d, c, i));
  fastft::cross_entropy_cpu(d.args(c), 2);
  CHECK(d.bad == -1, "bad row %lld", (long long)d.bad);
  Array& grad = c.in_place ? d.logits : d.grad;
  for (std::int64_t i = 0; i < c.rows; ++i) {
    const double size = 20.0;  // of the logits: their differences carry 6e-8 of it
    const double outer = (c.token ? std::fabs(d.token[i]) : 1.0) * (c.scaled ? std::fabs(d.scale[i]) : 1.0);
    const double token = c.token ? std::fabs(d.token[i]) : 1.0;
    CHECK(std::fabs(d.lse[i] - want[i].lse) <= 2e-7 * size, "lse %g want %g, V %lld", d.lse[i], want[i].lse,
          (long long)c.vocab);
    CHECK(std::fabs(d.loss[i] - want[i].loss) <= token * 4e-7 * size * (1 + 20 * c.z_loss), "loss %g want %g, V %lld",
          d.loss[i], want[i].loss, (long long)c.vocab);
    for (std::int64_t k = 0; k < c.vocab; ++k) {
      const double g = grad.get(i * (c.vocab + c.gap) + k), t = want[i].grad[k];
      const double rounding = c.dtype == DType::bf16 ? 0.00391 * std::fabs(t) + 1e-30 : 0.0;
      const bool ok = d.target[i] == kIgnore ? g == 0.0 : std::fabs(g - t) <= rounding + 1.5e-6 * outer;
      CHECK(ok, "grad %g want %g, V %lld, row %lld, class %lld of %lld", g, t, (long long)c.vocab, (long long)i,
            (long long)k, (long long)d.target[i]);
    }
    for (std::int64_t k = 0; k < (i + 1 < c.rows ? c.gap : 0); ++k) {  // the gap between rows stays as it was
      if (!c.in_place)
        CHECK(std::isnan(grad.get(i * (c.vocab + c.gap) + c.vocab + k)), "row %lld overran", (long long)i);
    }
  }
}

void run_degenerate(DType dtype, std::int64_t vocab) {
  const Case c{dtype, 5, vocab, 0, false, false, false, false, 0.0, 0.0, 0.0, 1.0};
  Data d(c);
  for (std::int64_t k = 0; k < vocab; ++k) {
    d.logits.set(k, -INFINITY);                              // row 0: all masked
    if (k % 3 != 0) d.logits.set(3 * vocab + k, -INFINITY);  // row 3: partly masked
  }
  d.logits.set(2 * vocab + vocab / 2, NAN);
  d.target = {0, kIgnore, 0, 0, vocab};
  const Truth masked = truth(d, c, 3);
  fastft::cross_entropy_cpu(d.args(c), 0);
  CHECK(d.bad == 4 && std::isnan(d.loss[4]), "out-of-range target: bad row %lld, loss %g", (long long)d.bad, d.loss[4]);
  CHECK(std::isnan(d.loss[0]) && std::isnan(d.loss[2]), "losses %g, %g", d.loss[0], d.loss[2]);
  CHECK(std::fabs(d.loss[3] - masked.loss) < 1e-5, "masked %g want %g", d.loss[3], masked.loss);
  for (std::int64_t k = 0; k < vocab; ++k) {
    CHECK(std::isnan(d.grad.get(k)) && std::isnan(d.grad.get(2 * vocab + k)), "class %lld", (long long)k);
    CHECK(d.grad.get(vocab + k) == 0.0f && d.grad.get(4 * vocab + k) == 0.0f, "class %lld", (long long)k);
    if (k % 3 != 0) CHECK(d.grad.get(3 * vocab + k) == 0.0f, "masked class %lld", (long long)k);
  }
  // Only ignored rows: their logits are not read, so a null pointer does.
  fastft::CrossEntropyArgs a = d.args(c);
  d.target.assign(5, kIgnore);
  a.logits = nullptr;
  a.lse = nullptr;
  fastft::cross_entropy_cpu(a, 1);
  CHECK(d.loss[0] == 0.0f && d.grad.get(0) == 0.0f && d.bad == -1, "all ignored: loss %g", d.loss[0]);
}

// Same bits from any number of threads, and from a loss that wants no gradient
void run_threads(DType dtype) {
  const Case c{dtype, 37, 5003, 1, true, true, true, false, 0.1, 1e-4, 0.0, 1.0};
  Data one(c);
  Data three = one;
  fastft::cross_entropy_cpu(one.args(c), 1);
  fastft::cross_entropy_cpu(three.args(c), 3);
  CHECK(one.grad.bytes == three.grad.bytes && one.loss == three.loss && one.lse == three.lse, "1 and 3 threads differ");
  fastft::CrossEntropyArgs a = three.args(c);
  a.grad = nullptr;
  fastft::cross_entropy_cpu(a, 2);
  CHECK(one.loss == three.loss, "the loss depends on the gradient");
}

}  // namespace

int main() {
  check::skip_unless_runnable();
  const std::int64_t vocabs[] = {1, 2, 15, 16, 17, 63, 507, 2048, 2049, 6151};
  int n = 0;
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (std::int64_t vocab : vocabs) {
      for (int bits = 0; bits < 128; ++bits) {
        if (vocab > 600 && bits % 7 != 0) continue;
        const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
        run({dtype, 1 + ++n % 4, vocab, n % 3, bit(0), bit(1), bit(2), n % 2 == 0, bit(3) ? 0.1 : 0.0,
             bit(4) ? 1e-3 : 0.0, bit(5) ? 30.0 : 0.0, bit(6) ? 0.7 : 1.0});
      }
    }
    run({dtype, 2, 256000, 1, true, true, true, false, 0.1, 1e-4, 0.0, 1.0});
    run_degenerate(dtype, 33);
    run_degenerate(dtype, 5003);
    run_threads(dtype);
  }
  return check::finish();
}
