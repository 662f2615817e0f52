// adamw_cpu with state and parameters in fewer bytes: random numbers, codes and remainders against scalar code of their
// definition (fastft/ops/quantized_state.py), the update against float64 within one rounding.
#include <algorithm>

#include "fastft/adamw.h"

#include "adamw_truth.h"
#include "check.h"

using check::Array;
using fastft::DType;
using fastft::ParamStore;
using fastft::StateStore;

namespace {

constexpr std::int64_t kSizes[] = {1, 0, 17, 255, 256, 257, 511, 16384, 16385 + 100};
constexpr int kCount = sizeof(kSizes) / sizeof(kSizes[0]);
constexpr double kLr = 1e-2, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8, kDecay = 0.1;
constexpr std::uint64_t kSeed = 0x1234567890abcdefull;

struct Case {
  DType param, grad;
  ParamStore store;
  StateStore state;
  std::int64_t shift;  // elements off alignment
};

std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

struct Random {
  std::uint32_t param, m, v;
};

Random random(std::uint32_t step, std::uint64_t position) {
  const std::uint32_t seed =
      mix(mix(static_cast<std::uint32_t>(kSeed) ^ 0x9e3779b9u) + static_cast<std::uint32_t>(kSeed >> 32));
  const std::uint32_t base = mix(seed + step), key1 = mix(base ^ 0xc2b2ae35u);
  std::uint32_t x =
      static_cast<std::uint32_t>(position) ^ mix(base + 0x85ebca6bu + static_cast<std::uint32_t>(position >> 32));
  x ^= x >> 16;
  x = x * 0x7feb352du + key1;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return {x >> 16, x & 0xffffu, (x * 0x9e3779b1u) >> 16};
}

// The value of a code, by the definition in words: eight steps, then binades of eight
double decode(std::uint8_t code, float scale, bool with_sign) {
  const int magnitude = with_sign ? code & 0x7f : code, low = with_sign ? -14 : -30;
  const double x =
      magnitude < 8 ? std::ldexp(magnitude, low - 3) : std::ldexp(8 + magnitude % 8, low - 3 + magnitude / 8 - 1);
  return (with_sign && code > 0x7f ? -x : x) * scale;
}

struct Tensor {
  Array param, grad;
  std::vector<float> m, v;  // the numbers that the state encodes before the step
  std::vector<std::uint8_t> m_bytes, v_bytes;
  std::vector<float> m_scale, v_scale;
  std::vector<std::int16_t> remainder;
  float step;
  std::int64_t n, offset;

  Tensor(std::int64_t count, const Case& c, float steps, std::int64_t first)
      : param(check::normal(count, 1.0f), c.param, c.shift),
        grad(check::normal(count, 0.1f), c.grad, c.shift),
        m(static_cast<std::size_t>(count)),
        v(m.size()),
        m_bytes(m.size() * 4 + 16),
        v_bytes(m_bytes.size()),
        m_scale(static_cast<std::size_t>((count + 255) / 256)),
        v_scale(m_scale.size()),
        remainder(m.size()),
        step(steps),
        n(count),
        offset(first) {
    std::uniform_int_distribution<int> codes(0, 248), upto(0, 120), sign(0, 1), rest(-32768, 32767);
    for (float& s : m_scale) s = 0.25f;
    for (float& s : v_scale) s = 0.03125f;
    for (std::int64_t i = 0; i < n; ++i) {
      remainder[i] = static_cast<std::int16_t>(rest(check::rng()));
      if (param.get(i) == 0)
        remainder[i] &= 0x7fff;  // as a number that rounds to 0 leaves it; less than 0 would be a NaN
      if (c.state == StateStore::u8) {
        m_bytes[i] = static_cast<std::uint8_t>(upto(check::rng()) | sign(check::rng()) << 7);
        v_bytes[i] = static_cast<std::uint8_t>(codes(check::rng()));
        m[i] = static_cast<float>(decode(m_bytes[i], m_scale[i / 256], true));
        v[i] = static_cast<float>(decode(v_bytes[i], v_scale[i / 256], false));
        continue;
      }
      m[i] = check::normal(1, 0.05f)[0];
      v[i] = std::fabs(check::normal(1, 0.01f)[0]);
      put(m_bytes, i, m[i], c.state);
      put(v_bytes, i, v[i], c.state);
      m[i] = get(m_bytes, i, c.state);
      v[i] = get(v_bytes, i, c.state);
    }
  }

  static void put(std::vector<std::uint8_t>& bytes, std::int64_t i, float x, StateStore state) {
    if (state == StateStore::f32) std::memcpy(&bytes[i * 4], &x, 4);
    const fastft::bf16 half = check::nearest_bf16(x);
    if (state == StateStore::bf16) std::memcpy(&bytes[i * 2], &half, 2);
  }
  static float get(const std::vector<std::uint8_t>& bytes, std::int64_t i, StateStore state) {
    float x;
    fastft::bf16 half;
    std::memcpy(&x, &bytes[state == StateStore::f32 ? i * 4 : 0], 4);
    std::memcpy(&half, &bytes[state == StateStore::bf16 ? i * 2 : 0], 2);
    return state == StateStore::f32 ? x : check::widen(half);
  }
  double value(std::int64_t i, const Case& c) {  // of the param
    float x = param.get(i);
    if (c.store != ParamStore::remainder) return x;
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    u += static_cast<std::uint32_t>(static_cast<std::int32_t>(remainder[i]));
    std::memcpy(&x, &u, 4);
    return x;
  }
  fastft::AdamWTensor view(const Case& c) {
    const bool coded = c.state == StateStore::u8;
    return {param.data(),
            grad.data(),
            m_bytes.data(),
            v_bytes.data(),
            nullptr,
            nullptr,
            c.store == ParamStore::remainder ? remainder.data() : nullptr,
            coded ? m_scale.data() : nullptr,
            coded ? v_scale.data() : nullptr,
            &step,
            n,
            offset};
  }
};

fastft::AdamWOptions options(const Case& c) {
  return {c.param, c.grad, c.store, c.state, kSeed, kLr,     nullptr, kBeta1,
          kBeta2,  kEps,   kDecay,  true,    false, nullptr, nullptr};
}

// x lies on the grid of 2^-low steps below and of 3 mantissa bits above: the distance of its neighbours
double spacing(double x, double scale, bool with_sign) {
  const int low = with_sign ? -14 : -30;
  int exponent;
  std::frexp(std::fmax(std::fabs(x) / scale, std::ldexp(1.0, low)), &exponent);
  return std::ldexp(scale, exponent - 4);
}

void compare_state(const Tensor& t, std::int64_t i, const check::AdamWTruth& want, const Case& c) {
  const double m = want.m, v = want.v;
  double got_m, got_v, m_rounding, v_rounding;
  if (c.state == StateStore::u8) {
    const float m_scale = t.m_scale[i / 256], v_scale = t.v_scale[i / 256];
    got_m = decode(t.m_bytes[i], m_scale, true), got_v = decode(t.v_bytes[i], v_scale, false);
    m_rounding = spacing(m, m_scale, true), v_rounding = spacing(v, v_scale, false);
    CHECK(v == 0.0 || got_v > 0.0, "v %g became 0", v);
  } else {
    const double unit = c.state == StateStore::bf16 ? 0.0079 : 0.0;  // stochastic rounding: to either neighbour
    got_m = Tensor::get(t.m_bytes, i, c.state), got_v = Tensor::get(t.v_bytes, i, c.state);
    m_rounding = unit * std::fabs(m), v_rounding = unit * v;
  }
  CHECK(std::fabs(got_m - m) <= m_rounding + 1.01 * want.m_error, "m %g want %g, n %lld", got_m, m, (long long)t.n);
  CHECK(std::fabs(got_v - v) <= v_rounding + 1.01 * want.v_error, "v %g want %g, n %lld", got_v, v, (long long)t.n);
}

void run(const Case& c) {
  std::vector<Tensor> tensors;
  const std::int64_t wrap = std::int64_t{1} << 32;
  for (int k = 0; k < kCount; ++k)
    tensors.emplace_back(kSizes[k], c, static_cast<float>(k), k % 2 ? wrap - 100 : 5 * k);
  const std::vector<Tensor> before = tensors;
  std::vector<fastft::AdamWTensor> views;
  for (Tensor& t : tensors) views.push_back(t.view(c));
  const fastft::AdamWOptions o = options(c);
  fastft::adamw_cpu(views.data(), views.size(), o, 2);
  for (int k = 0; k < kCount; ++k) {
    Tensor& t = tensors[k];
    Tensor old = before[k];
    CHECK(t.step == old.step + 1.0f, "step %g", t.step);
    for (std::int64_t i = 0; i < t.n; ++i) {
      const double v = old.v[i];
      const check::AdamWTruth want =
          check::adamw_truth({old.value(i, c), old.grad.get(i), old.m[i], v, v}, o, t.step, false);
      const bool wide = c.param == DType::f32 || c.store == ParamStore::remainder;
      const double tolerance = want.p_error + (wide ? 0.0 : 0.0079 * (std::fabs(want.p) + want.p_error));
      CHECK(std::fabs(t.value(i, c) - want.p) <= tolerance, "p %g want %g, n %lld i %lld", t.value(i, c), want.p,
            (long long)t.n, (long long)i);
      compare_state(t, i, want, c);
    }
    for (std::size_t i = static_cast<std::size_t>(t.n) * (c.state == StateStore::u8     ? 1
                                                          : c.state == StateStore::bf16 ? 2
                                                                                        : 4);
         i < t.m_bytes.size(); ++i) {
      CHECK(t.m_bytes[i] == 0 && t.v_bytes[i] == 0, "written past the end of %lld", (long long)t.n);
    }
  }
}

// Without gradient and exp_avg the param only decays, by a factor that leaves its bits exact: what is stored is the
// rounding alone.
void run_rounding() {
  const std::int64_t n = 1000;
  const Case c{DType::bf16, DType::f32, ParamStore::stochastic, StateStore::f32, 1};
  Tensor t(n, c, 6.0f, (std::int64_t{1} << 32) - 500);
  for (std::int64_t i = 0; i < n; ++i) t.grad.set(i, 0.0f);
  std::fill(t.m_bytes.begin(), t.m_bytes.end(), std::uint8_t{0});
  Tensor old = t;
  fastft::AdamWOptions o = options(c);
  o.lr = 0.5;
  o.weight_decay = 0.001953125;
  const fastft::AdamWTensor view = t.view(c);
  fastft::adamw_cpu(&view, 1, o, 2);
  for (std::int64_t i = 0; i < n; ++i) {
    const float exact = old.param.get(i) * (1.0f - 0.0009765625f);
    std::uint32_t u;
    std::memcpy(&u, &exact, 4);
    const std::uint32_t want = (u + random(7, static_cast<std::uint64_t>(t.offset + i)).param) >> 16;
    CHECK(static_cast<fastft::bf16*>(t.param.data())[i].bits == want, "element %lld", (long long)i);
  }
}

// The result may not depend on how many threads share the work.
void run_threads() {
  const Case c{DType::bf16, DType::bf16, ParamStore::stochastic, StateStore::u8, 1};
  Tensor one(100003, c, 4.0f, 7);
  Tensor three = one;
  const fastft::AdamWTensor a = one.view(c), b = three.view(c);
  fastft::adamw_cpu(&a, 1, options(c), 1);
  fastft::adamw_cpu(&b, 1, options(c), 3);
  CHECK(one.param.bytes == three.param.bytes && one.m_bytes == three.m_bytes && one.v_bytes == three.v_bytes &&
            one.m_scale == three.m_scale && one.v_scale == three.v_scale,
        "1 and 3 threads differ");
}

}  // namespace

int main() {
  check::skip_unless_runnable();
  int number = 0;
  for (const StateStore state : {StateStore::f32, StateStore::bf16, StateStore::u8}) {
    for (const DType grad : {DType::f32, DType::bf16}) {
      run({DType::f32, grad, ParamStore::nearest, state, number++ % 3});
      for (const ParamStore store : {ParamStore::nearest, ParamStore::stochastic, ParamStore::remainder}) {
        run({DType::bf16, grad, store, state, number++ % 3});
      }
    }
  }
  run_rounding();
  run_threads();
  return check::finish();
}
