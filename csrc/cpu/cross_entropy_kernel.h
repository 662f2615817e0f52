// The two loops over a row of logits. Included once per instruction set, inside that ISA's namespace.

enum Smooth { kNone, kUniform, kWeighted };

struct CeVectors {
  V scale, softcap;
};

// Independent sums: four hide the latency of an addition; one lane needs more, or 2048 terms in 4 sums lose a digit.
constexpr int kSums = kWidth == 1 ? 32 : 4;

// Largest scaled logit of a block, before the cap (which is monotonic). NaN is passed over here: exp will bring it
// back.
template <class T>
FASTFT_INLINE float block_max(const T* p, const CeVectors& c, std::int64_t n) {
  V m[kSums];
  for (V& x : m) x = set1(-__builtin_inff());
  std::int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    for (int u = 0; u < kSums; ++u) m[u] = max(load(p + i + u * kWidth) * c.scale, m[u]);
  }
  for (; i < n; i += kWidth) {
    const std::int64_t k = n - i < kWidth ? n - i : kWidth;
    const V x = (k == kWidth ? load(p + i) : load_n(p + i, k)) * c.scale;
    m[0] = max(keep_n(x, k, -__builtin_inff()), m[0]);
  }
  for (int u = 1; u < kSums; ++u) m[0] = max(m[u], m[0]);
  return reduce_max(m[0]);
}

struct BlockSums {
  float exp, weighted;
};

// Sums of exp(x - top) and of weight * x over a block; stores the exps when they are wanted.
template <class T, bool CAP, Smooth SMOOTH>
FASTFT_INLINE BlockSums block_sums(const T* p, float* exps, const float* weight, const CeVectors& c, V top,
                                   std::int64_t n) {
  V sum[kSums], weighted[kSums];
  for (int u = 0; u < kSums; ++u) sum[u] = weighted[u] = set1(0.0f);
  const auto add = [&](int u, V x, std::int64_t at, std::int64_t k) __attribute__((always_inline)) {
    if (CAP) x = c.softcap * tanh(x / c.softcap);
    const bool all = k == kWidth;
    const V e = exp((all ? x : keep_n(x, k, -__builtin_inff())) - top);
    sum[u] = sum[u] + e;
    if (exps) store(exps + at, e);
    if (SMOOTH == kUniform) weighted[u] = weighted[u] + (all ? x : keep_n(x, k, 0.0f));
    if (SMOOTH == kWeighted) {
      const V w = all ? load(weight + at) : load_n(weight + at, k);
      weighted[u] = fma(w, all ? x : keep_n(x, k, 0.0f), weighted[u]);
    }
  };
  std::int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    // The next block, or block_max would wait for memory with nothing to compute, and this loop compute with no load
    // under way.
    for (std::int64_t b = 0; b < kSums * kWidth * std::int64_t{sizeof(T)}; b += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(p + i + kCeBlock) + b);
    }
    for (int u = 0; u < kSums; ++u) add(u, load(p + i + u * kWidth) * c.scale, i + u * kWidth, kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) add(0, load(p + i) * c.scale, i, kWidth);
  if (i < n) add(0, load_n(p + i, n - i) * c.scale, i, n - i);
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) {
      sum[u] = sum[u] + sum[u + half];
      weighted[u] = weighted[u] + weighted[u + half];
    }
  }
  return {reduce_add(sum[0]), reduce_add(weighted[0])};
}

// Online softmax by blocks that stay in the L1 cache: fp32 lanes within a block, float64 across blocks, so that 256k
// logits sum as exactly as 1k.
template <class T, bool CAP, Smooth SMOOTH>
CeStats stats(const CeLogits& l) {
  const T* row = static_cast<const T*>(l.row);
  const CeVectors c{set1(l.scale), set1(l.softcap)};
  float top = -__builtin_inff();
  double sum = 0.0, weighted = 0.0;
  for (std::int64_t at = 0; at < l.n; at += kCeBlock) {
    const std::int64_t n = l.n - at < kCeBlock ? l.n - at : kCeBlock;
    float high = block_max(row + at, c, n);
    if (CAP) high = first_lane(c.softcap * tanh(set1(high) / c.softcap));
    if (high > top) {
      if (sum != 0.0) sum *= __builtin_exp(static_cast<double>(top) - high);
      top = high;
    }
    // All -inf so far: any finite reference gives exp(-inf) = 0 and lets NaN through.
    const float reference = top == -__builtin_inff() ? 0.0f : top;
    float* exps = l.exps ? l.exps + at / kCeBlock * kCeBlockFloats : nullptr;
    const float* weight = SMOOTH == kWeighted ? l.weight + at : nullptr;
    const BlockSums s = block_sums<T, CAP, SMOOTH>(row + at, exps, weight, c, set1(reference), n);
    sum += s.exp;
    if (exps) exps[kCeBlock] = reference;
    weighted += s.weighted;
  }
  float target = 0.0f, target_tanh = 0.0f;
  if (l.target >= 0) {
    target = first_lane(load_n(row + l.target, 1) * c.scale);
    if (CAP) {
      target_tanh = first_lane(tanh(set1(target) / c.softcap));
      target = first_lane(c.softcap * set1(target_tanh));
    }
  }
  return {top == -__builtin_inff() ? 0.0f : top, sum, weighted, target, target_tanh};
}

template <class T>
CeStats ce_stats(const CeLogits& l) {
  if (l.softcap != 0.0f) {
    if (!l.smooth) return stats<T, true, kNone>(l);
    return l.weight ? stats<T, true, kWeighted>(l) : stats<T, true, kUniform>(l);
  }
  if (!l.smooth) return stats<T, false, kNone>(l);
  return l.weight ? stats<T, false, kWeighted>(l) : stats<T, false, kUniform>(l);
}

// factor * exps - smooth * weight, by the cap's slope, over one block
template <class T, bool CAP, Smooth SMOOTH>
struct BlockGrad {
  const T* row;  // for the cap only
  const float* exps;
  const float* weight;
  V scale, softcap, factor, smooth;

  inline __attribute__((always_inline)) V at(std::int64_t i, std::int64_t k) const {
    const bool all = k == kWidth;
    V d = (all ? load(exps + i) : load_n(exps + i, k)) * factor;
    if (SMOOTH == kUniform) d = d - smooth;
    if (SMOOTH == kWeighted) d = fnma(smooth, all ? load(weight + i) : load_n(weight + i, k), d);
    if (CAP) {
      const V t = tanh((all ? load(row + i) : load_n(row + i, k)) * scale / softcap);
      d = d * fnma(t, t, set1(1.0f));
    }
    return d;
  }
};

template <class T, class Grad>
FASTFT_INLINE void write_block(T* out, const Grad& grad, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int u = 0; u < 4; ++u) store(out + i + u * kWidth, grad.at(i + u * kWidth, kWidth));
  }
  for (; i < n; i += kWidth) {
    const std::int64_t k = n - i < kWidth ? n - i : kWidth;
    store_n(out + i, grad.at(i, k), k);
  }
}

template <class T, bool CAP, Smooth SMOOTH>
void gradient(const CeLogits& l, const CeGrad& g) {
  const T* row = static_cast<const T*>(l.row);
  T* out = static_cast<T*>(g.row);
  const float* exps = l.exps;
  for (std::int64_t at = 0; at < l.n; at += kCeBlock, exps += kCeBlockFloats) {
    const std::int64_t n = l.n - at < kCeBlock ? l.n - at : kCeBlock;
    const float factor = static_cast<float>(g.factor * __builtin_exp(static_cast<double>(exps[kCeBlock]) - g.max));
    const float* weight = SMOOTH == kWeighted ? l.weight + at : nullptr;
    const BlockGrad<T, CAP, SMOOTH> grad{row + at,        exps,         weight,        set1(l.scale),
                                         set1(l.softcap), set1(factor), set1(g.smooth)};
    write_block(out + at, grad, n);
  }
}

template <class T>
void ce_grad(const CeLogits& l, const CeGrad& g) {
  const Smooth smooth = g.smooth == 0.0f ? kNone : l.weight ? kWeighted : kUniform;
  if (l.softcap != 0.0f) {
    if (smooth == kNone) return gradient<T, true, kNone>(l, g);
    return smooth == kWeighted ? gradient<T, true, kWeighted>(l, g) : gradient<T, true, kUniform>(l, g);
  }
  if (smooth == kNone) return gradient<T, false, kNone>(l, g);
  return smooth == kWeighted ? gradient<T, false, kWeighted>(l, g) : gradient<T, false, kUniform>(l, g);
}
