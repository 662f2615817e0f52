// One element's AdamW step in float64, and by how much float32 may miss it: every rounding of the update is at most
// half a unit of what it rounds, so the bounds follow from the formulas and hold for any input, also where terms
// cancel.
#pragma once

#include <cmath>

#include "fastft/adamw.h"

namespace check {

struct AdamWElement {
  double p, g, m, v, vmax;
};

struct AdamWTruth {
  double p, m, v, vmax;
  double p_error, m_error, v_error;  // v_error is vmax's too
};

// step: of this update, 1 for the first. Scale and learning rate behind pointers are read as the kernels read them.
inline AdamWTruth adamw_truth(const AdamWElement& e, const fastft::AdamWOptions& o, double step, bool amsgrad) {
  constexpr double half_ulp = 6e-8;
  const double lr = o.lr_ptr ? *o.lr_ptr : o.lr;
  double p = e.p, g = e.g;
  if (o.grad_scale) g *= *o.grad_scale;
  if (o.maximize) g = -g;
  const double g_error = 2 * half_ulp * (std::fabs(g) + (o.decoupled ? 0 : o.weight_decay * std::fabs(p)));
  if (o.decoupled) p -= lr * o.weight_decay * p;
  else g += o.weight_decay * p;
  AdamWTruth r{};
  r.m = o.beta1 * e.m + (1 - o.beta1) * g;
  r.m_error = (1 - o.beta1) * (g_error + 2 * half_ulp * (std::fabs(g) + std::fabs(e.m))) + half_ulp * std::fabs(r.m);
  r.v = o.beta2 * e.v + (1 - o.beta2) * g * g;
  r.v_error = 4 * half_ulp * r.v + (1 - o.beta2) * (2 * std::fabs(g) + g_error) * g_error;
  r.vmax = std::fmax(e.vmax, r.v);
  const double second = amsgrad ? r.vmax : r.v;
  const double denom = std::sqrt(second) / std::sqrt(1 - std::pow(o.beta2, step)) + o.eps;
  const double rate = lr / (1 - std::pow(o.beta1, step)) / denom;
  const double relative = 6 * half_ulp + (second > 0 ? 0.5 * r.v_error / second : 0);  // of rate
  r.p = p - rate * r.m;
  r.p_error = half_ulp * (2 * std::fabs(e.p) + std::fabs(r.p)) + rate * (r.m_error + relative * std::fabs(r.m));
  return r;
}

}  // namespace check
