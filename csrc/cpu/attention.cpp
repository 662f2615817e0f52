// Causal attention within documents on the CPU: tasks of one document, one group of heads and some of its tokens, the
// longest first. What a task sums it sums alone and in one order, so the bits do not depend on who takes which.
#include <algorithm>
#include <type_traits>
#include <cstddef>
#include <vector>

#include "fastft/decoder.h"
#include "kernels.h"

namespace fastft {
namespace {

// A document's keys, values and their gradients stay in float32 while one thread does all of its backward; beyond so
// many tokens that is more than a cache, and its parts are done one by one.
constexpr std::int64_t kWholeTokens = 16384;

struct Task {
  std::int64_t document, group;
  cpu::AttentionPart part;
  double work;  // keys times queries
};

// Pairs of token and key of `count` tokens from `first` on
double pairs(std::int64_t first, std::int64_t count, std::int64_t window) {
  const double mean = static_cast<double>(first) + static_cast<double>(count + 1) / 2;
  return static_cast<double>(count) * (window > 0 ? std::min(mean, static_cast<double>(window)) : mean);
}

struct Call {
  const Attention& a;
  const AttentionGradients* g;  // null: forward
  const cpu::Kernels& k;
  std::int64_t ratio, size;  // heads a group; bytes of an element

  Call(const Attention& attention, const AttentionGradients* gradients)
      : a(attention),
        g(gradients),
        k(cpu::kernels()),
        ratio(attention.heads / attention.groups),
        size(attention.dtype == DType::f32 ? 4 : 2) {}

  template <class P>
  P at(P array, std::int64_t element) const {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<P>>, const char, char>;
    return array ? static_cast<Byte*>(array) + element * size : nullptr;
  }

  std::int64_t tokens(std::int64_t document) const { return a.bounds[document + 1] - a.bounds[document]; }

  cpu::AttentionGroup group(const Task& task) const {
    const std::int64_t token = a.bounds[task.document], head = task.group * ratio * a.dim, key = task.group * a.dim;
    const std::int64_t out_stride = a.heads * a.dim, out = token * out_stride + head;
    cpu::AttentionGroup x{};
    x.q = at(a.q, token * a.q_stride + head);
    x.k = at(a.k, token * a.k_stride + key);
    x.v = at(a.v, token * a.v_stride + key);
    x.q_stride = a.q_stride, x.k_stride = a.k_stride, x.v_stride = a.v_stride;
    x.out = at(a.out, out);
    x.out_stride = out_stride;
    x.lse = a.lse + token * a.heads + task.group * ratio;
    x.lse_stride = a.heads;
    if (g) {
      x.grad = at(g->grad, out);
      x.dq = at(g->dq, token * g->dq_stride + head);
      x.dk = at(g->dk, token * g->dk_stride + key);
      x.dv = at(g->dv, token * g->dv_stride + key);
      x.dq_stride = g->dq_stride, x.dk_stride = g->dk_stride, x.dv_stride = g->dv_stride;
    }
    x.tokens = tokens(task.document);
    x.ratio = ratio;
    x.dim = a.dim;
    x.window = a.window;
    x.scale = static_cast<float>(a.scale);
    return x;
  }

  void run(std::vector<Task>& tasks, int threads) const {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.work > y.work; });
    std::int64_t keys = 0;
    for (const Task& t : tasks) {
      if (g && t.part.keys) keys = std::max(keys, t.part.key_end - t.part.key_begin);
    }
    const std::size_t floats = static_cast<std::size_t>(k.attention_scratch(ratio, a.dim, keys)) + 16;
    const int type = static_cast<int>(a.dtype);
    const std::int64_t count = static_cast<std::int64_t>(tasks.size());
#pragma omp parallel num_threads(threads) if (count > 1)
    {
      static thread_local std::vector<float> kept;  // fresh pages at every call would cost more than a short document
      if (kept.size() < floats) kept.resize(floats);
      float* scratch = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(kept.data()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = 0; i < count; ++i) {
        const Task& t = tasks[static_cast<std::size_t>(i)];
        const cpu::AttentionGroup x = group(t);
        if (g) k.attention_backward[type](x, t.part, scratch);
        else k.attention_forward[type](x, t.part.query_begin, t.part.query_end - t.part.query_begin, scratch);
      }
    }
  }
};

}  // namespace

void attention_forward_cpu(const Attention& a, int num_threads) {
  const Call call(a, nullptr);
  const std::int64_t step = cpu::attention_queries(call.ratio);
  std::vector<Task> tasks;
  for (std::int64_t d = 0; d < a.documents; ++d) {
    const std::int64_t n = call.tokens(d);
    for (std::int64_t first = 0; first < n; first += step) {
      const std::int64_t end = std::min(n, first + step);
      for (std::int64_t group = 0; group < a.groups; ++group) {
        tasks.push_back({d, group, {first, end, 0, n, true, false}, pairs(first, end - first, a.window)});
      }
    }
  }
  call.run(tasks, cpu::thread_count(num_threads));
}

void attention_backward_cpu(const Attention& a, const AttentionGradients& g, int num_threads) {
  const Call call(a, &g);
  const int threads = cpu::thread_count(num_threads);
  const std::int64_t step = cpu::attention_queries(call.ratio);
  double total = 0.0;
  for (std::int64_t d = 0; d < a.documents; ++d) {
    total += pairs(0, call.tokens(d), a.window) * static_cast<double>(a.groups);
  }
  std::vector<Task> tasks;
  for (std::int64_t d = 0; d < a.documents; ++d) {
    const std::int64_t n = call.tokens(d);
    if (n == 0) continue;
    const double work = pairs(0, n, a.window);
    for (std::int64_t group = 0; group < a.groups; ++group) {
      if (n <= kWholeTokens && work * threads <= total) {
        tasks.push_back({d, group, {0, n, 0, n, true, true}, work});
        continue;
      }
      // Longer than a thread's share: keys' and queries' gradients apart, two products of seven done twice
      const std::int64_t keys = cpu::kAttentionKeys * 4;
      for (std::int64_t key = 0; key < n; key += keys) {
        const std::int64_t end = std::min(n, key + keys);
        const std::int64_t begin = key / step * step;
        const std::int64_t last = a.window > 0 ? std::min(n, end + a.window) : n;
        const double share = static_cast<double>(end - key) * static_cast<double>(last - begin);
        tasks.push_back({d, group, {begin, n, key, end, false, true}, share});
      }
      for (std::int64_t first = 0; first < n; first += step) {
        const std::int64_t end = std::min(n, first + step);
        tasks.push_back({d, group, {first, end, 0, n, true, false}, pairs(first, end - first, a.window)});
      }
    }
  }
  call.run(tasks, threads);
}

}  // namespace fastft
