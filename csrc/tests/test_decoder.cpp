// A decoder layer's kernels against float64 loops: odd sizes, both types, several documents, windows, and the same bits
// whatever the number of threads.
#include "fastft/decoder.h"

#include <algorithm>

#include "check.h"

using check::Array;
using fastft::DType;

namespace {

double unit(DType type) { return type == DType::f32 ? 6e-8 : 4e-3; }

// Within a rounding of the truth, beside terms of size `scale`
void close(Array& got, std::int64_t i, double truth, DType type, double scale, const char* what) {
  const double error = std::fabs(got.get(i) - truth), allowed = unit(type) * std::fabs(truth) + 4e-6 * scale + 1e-34;
  CHECK(error <= allowed, "%s[%lld]: %g, not %g", what, static_cast<long long>(i), got.get(i), truth);
}

void same(const Array& a, const Array& b, const char* what) { CHECK(a.bytes == b.bytes, "%s: threads show", what); }

Array zeros(std::int64_t n, DType type, std::int64_t offset = 0) {
  return Array(std::vector<float>(static_cast<std::size_t>(n), 0.0f), type, offset);
}

void test_rms(DType type, std::int64_t rows, std::int64_t n, bool residual) {
  Array x(check::normal(rows * n, 1.0f), type, 1), r(check::normal(rows * n, 1.0f), type),
      w(check::normal(n, 1.0f), type, 3);
  Array dy(check::normal(rows * n, 1.0f), type), total = zeros(rows * n, type), y = zeros(rows * n, type);
  std::vector<float> rstd(static_cast<std::size_t>(rows));
  fastft::rms_forward_cpu({x.data(), residual ? r.data() : nullptr, w.data(), residual ? total.data() : nullptr,
                           y.data(), rstd.data(), rows, n, 1e-5, type},
                          3);
  Array& seen = residual ? total : x;
  std::vector<double> dweight(static_cast<std::size_t>(n), 0.0);
  Array dx[2] = {zeros(rows * n, type), zeros(rows * n, type)}, again = zeros(rows * n, type);
  std::vector<float> sums[2] = {std::vector<float>(static_cast<std::size_t>(n)),
                                std::vector<float>(static_cast<std::size_t>(n))};
  for (int turn = 0; turn < 2; ++turn) {
    fastft::rms_backward_cpu({dy.data(), seen.data(), w.data(), rstd.data(), residual ? r.data() : nullptr,
                              dx[turn].data(), again.data(), sums[turn].data(), rows, n, type},
                             turn ? 5 : 1);
  }
  same(dx[0], dx[1], "dx");
  CHECK(sums[0] == sums[1], "dweight: threads show");
  for (std::int64_t i = 0; i < rows; ++i) {
    double square = 0.0, mean = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
      if (residual) {
        const double sum = static_cast<double>(x.get(i * n + j)) + r.get(i * n + j);
        close(total, i * n + j, sum, type, 1.0, "total");
      }
      square += static_cast<double>(seen.get(i * n + j)) * seen.get(i * n + j);
    }
    const double s = 1.0 / std::sqrt(square / static_cast<double>(n) + 1e-5);
    CHECK(std::fabs(rstd[i] - s) <= 1e-6 * s, "rstd: %g, not %g", rstd[i], s);
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t at = i * n + j;
      close(y, at, seen.get(at) * s * w.get(j), type, 1.0, "y");
      close(again, at, seen.get(at) * s * w.get(j), type, 1.0, "y again");
      mean += static_cast<double>(dy.get(at)) * w.get(j) * seen.get(at) * s / static_cast<double>(n);
      dweight[j] += static_cast<double>(dy.get(at)) * seen.get(at) * s;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t at = i * n + j;
      const double truth = s * (static_cast<double>(dy.get(at)) * w.get(j) - seen.get(at) * s * mean);
      close(dx[0], at, truth + (residual ? r.get(at) : 0.0), type, 5.0 * s, "dx");
    }
  }
  for (std::int64_t j = 0; j < n; ++j) {
    CHECK(std::fabs(sums[0][j] - dweight[j]) <= 4e-6 * static_cast<double>(rows), "dweight: %g, not %g", sums[0][j],
          dweight[j]);
  }
}

void test_rope(DType type, std::int64_t rows, std::int64_t heads, std::int64_t dim, std::int64_t period) {
  const std::int64_t stride = heads * dim + 5, half = dim / 2;
  const std::vector<float> values = check::normal(rows * stride, 1.0f);
  const std::vector<float> cos = check::normal(period * dim, 1.0f), sin = check::normal(period * dim, 1.0f);
  for (bool back : {false, true}) {
    Array x(values, type), before(values, type);
    fastft::rope_cpu({x.data(), cos.data(), sin.data(), rows, stride, heads, dim, period, dim, back, type}, 2);
    for (std::int64_t i = 0; i < rows * stride; ++i) {
      const std::int64_t in_row = i % stride, j = in_row % dim, row = i / stride % period * dim;
      if (in_row >= heads * dim) {
        CHECK(x.get(i) == before.get(i), "an element behind the heads changed");
        continue;
      }
      const double s = (back ? -1.0 : 1.0) * sin[row + j % half], c = cos[row + j % half];
      const double truth =
          j < half ? before.get(i) * c - before.get(i + half) * s : before.get(i) * c + before.get(i - half) * s;
      close(x, i, truth, type, 5.0, "rope");
    }
  }
}

void test_gated(DType type, std::int64_t rows, std::int64_t width) {
  const std::int64_t stride = 2 * width;
  std::vector<float> values = check::normal(rows * stride, 3.0f);
  values[0] = 100.0f;
  if (values.size() > 4) values[1] = -100.0f;
  Array both(values, type), dout(check::normal(rows * width, 1.0f), type), out = zeros(rows * width, type);
  Array kept(values, type), grad = dout;
  const auto up = [&](Array& x) { return static_cast<char*>(x.data()) + width * (type == DType::f32 ? 4 : 2); };
  fastft::gated_forward_cpu({both.data(), up(both), out.data(), rows, width, stride, type}, 2);
  fastft::gated_backward_cpu(
      {both.data(), up(both), dout.data(), dout.data(), both.data(), up(both), rows, width, stride, type}, 3);
  same(out, dout, "the forward again");
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < width; ++j) {
      const double g = kept.get(i * stride + j), u = kept.get(i * stride + width + j), d = grad.get(i * width + j);
      const double s = 1.0 / (1.0 + std::exp(-g));
      close(out, i * width + j, g * s * u, type, std::fabs(g * s * u) / 4, "gated");
      close(both, i * stride + width + j, d * g * s, type, std::fabs(d * g * s) / 4, "dup");
      close(both, i * stride + j, d * u * s * (1.0 + g * (1.0 - s)), type,
            std::fabs(d * u) * (1.0 + std::fabs(g) * s * (1.0 - s)), "dgate");
    }
  }
}

void test_attention(DType type, const std::vector<std::int32_t>& bounds, std::int64_t heads, std::int64_t groups,
                    std::int64_t dim, std::int64_t window) {
  const std::int64_t n = bounds.back(), ratio = heads / groups, width = (heads + 2 * groups) * dim;
  const std::int64_t documents = static_cast<std::int64_t>(bounds.size()) - 1;
  const double scale = 0.4;
  Array qkv(check::normal(n * width, 1.0f), type, 1), grad(check::normal(n * heads * dim, 1.0f), type);
  const std::int64_t size = type == DType::f32 ? 4 : 2;
  char *q = static_cast<char*>(qkv.data()), *k = q + heads * dim * size, *v = k + groups * dim * size;
  Array out[2] = {zeros(n * heads * dim, type), zeros(n * heads * dim, type)};
  Array dqkv[2] = {zeros(n * width, type), zeros(n * width, type)};
  std::vector<float> lse[2] = {std::vector<float>(static_cast<std::size_t>(n * heads)),
                               std::vector<float>(static_cast<std::size_t>(n * heads))};
  for (int turn = 0; turn < 2; ++turn) {  // many threads take parts of documents
    const fastft::Attention a{q,     k,      v,   width, width,  width, bounds.data(),    documents,
                              heads, groups, dim, scale, window, type,  out[turn].data(), lse[turn].data()};
    char* dq = static_cast<char*>(dqkv[turn].data());
    fastft::attention_forward_cpu(a, turn ? 16 : 1);
    fastft::attention_backward_cpu(
        a, {grad.data(), dq, dq + heads * dim * size, dq + (heads + groups) * dim * size, width, width, width},
        turn ? 16 : 1);
  }
  same(out[0], out[1], "attention");
  same(dqkv[0], dqkv[1], "attention's gradients");
  CHECK(lse[0] == lse[1], "lse: threads show");
  std::vector<double> truth(static_cast<std::size_t>(n * width), 0.0), p;
  for (std::int64_t d = 0; d < documents; ++d) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t key = heads * dim + h / ratio * dim, value = key + groups * dim;
      for (std::int64_t t = bounds[d]; t < bounds[d + 1]; ++t) {
        const std::int64_t first = window > 0 ? std::max<std::int64_t>(bounds[d], t - window + 1) : bounds[d];
        p.assign(static_cast<std::size_t>(t - first + 1), 0.0);
        double top = -INFINITY, sum = 0.0;
        for (std::int64_t s = first; s <= t; ++s) {
          for (std::int64_t j = 0; j < dim; ++j) {
            p[s - first] += scale * qkv.get(t * width + h * dim + j) * qkv.get(s * width + key + j);
          }
          top = std::max(top, p[s - first]);
        }
        for (double& x : p) sum += x = std::exp(x - top);
        const double log_sum = top + std::log(sum);
        CHECK(std::fabs(lse[0][t * heads + h] - log_sum) <= 1e-5, "lse: %g, not %g", lse[0][t * heads + h], log_sum);
        double dot = 0.0;
        for (std::int64_t j = 0; j < dim; ++j) {
          double o = 0.0;
          for (std::int64_t s = first; s <= t; ++s) o += p[s - first] / sum * qkv.get(s * width + value + j);
          close(out[0], (t * heads + h) * dim + j, o, type, 1.0, "attention");
          dot += o * grad.get((t * heads + h) * dim + j);
        }
        for (std::int64_t s = first; s <= t; ++s) {
          const double weight = p[s - first] / sum;
          double dp = 0.0;
          for (std::int64_t j = 0; j < dim; ++j) {
            const double g = grad.get((t * heads + h) * dim + j);
            dp += g * qkv.get(s * width + value + j);
            truth[s * width + value + j] += weight * g;
          }
          for (std::int64_t j = 0; j < dim; ++j) {
            truth[t * width + h * dim + j] += scale * weight * (dp - dot) * qkv.get(s * width + key + j);
            truth[s * width + key + j] += scale * weight * (dp - dot) * qkv.get(t * width + h * dim + j);
          }
        }
      }
    }
  }
  // The backward takes the result as it was rounded
  const double scale_of = type == DType::f32 ? 20.0 : 8e3 * std::sqrt(static_cast<double>(dim));
  for (std::int64_t i = 0; i < n * width; ++i) close(dqkv[0], i, truth[i], type, scale_of, "attention's gradients");
}

}  // namespace

int main() {
  check::skip_unless_runnable();
  for (DType type : {DType::f32, DType::bf16}) {
    for (std::int64_t n : {1, 7, 16, 33, 130}) {
      test_rms(type, 3, n, false);
      test_rms(type, 70, n, true);
      test_gated(type, 5, n);
    }
    for (std::int64_t dim : {2, 6, 16, 34}) test_rope(type, 9, 3, dim, 3);
    for (std::int64_t window : {0, 1, 5, 70}) {
      test_attention(type, {0, 5, 5, 6, 23}, 6, 2, 8, window);
      test_attention(type, {0, 131, 150}, 3, 1, 10, window);
      test_attention(type, {0, 65}, 2, 2, 3, window);
      test_attention(type, {0, 200}, 4, 4, 34, window);
    }
    test_attention(type, {0, 9}, 200, 1, 2, 0);
    test_attention(type, {0, 0}, 2, 1, 4, 0);
  }
  return check::finish();
}
