// Rows of RMS norm, rotary embedding and gated MLP. Included once per instruction set, inside that ISA's namespace.

template <class T>
FASTFT_INLINE V load_some_of(const T* p, std::int64_t k) {
  return k == kWidth ? load(p) : load_n(p, k);
}
template <class T>
FASTFT_INLINE void store_some_of(T* p, V x, std::int64_t k) {
  if (k == kWidth) store(p, x);
  else store_n(p, x, k);
}

// body(i, lanes, accumulator) over n elements; kSums accumulators take turns
template <class Body>
FASTFT_INLINE void over_row(std::int64_t n, const Body& body) {
  std::int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    for (int u = 0; u < kSums; ++u) body(i + u * kWidth, kWidth, u);
  }
  for (int u = 0; i + kWidth <= n; i += kWidth, ++u) body(i, kWidth, u);
  if (i < n) body(i, n - i, 0);
}

FASTFT_INLINE float total_of(V* sums) {
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) sums[u] = sums[u] + sums[u + half];
  }
  return reduce_add(sums[0]);
}

template <class T>
float rms_forward(const void* x, const void* residual, const void* weight, void* total, void* y, std::int64_t n,
                  float eps) {
  const T *px = static_cast<const T*>(x), *pr = static_cast<const T*>(residual), *pw = static_cast<const T*>(weight);
  T *pt = static_cast<T*>(total), *py = static_cast<T*>(y);
  V sums[kSums];
  for (V& s : sums) s = set1(0.0f);
  if (pr) {
    over_row(n, [&](std::int64_t i, std::int64_t k, int u) __attribute__((always_inline)) {
      store_some_of(pt + i, load_some_of(px + i, k) + load_some_of(pr + i, k), k);
      const V v = load_some_of(pt + i, k);  // as rounded: what the backward will see
      sums[u] = fma(v, v, sums[u]);
    });
    px = pt;
  } else {
    over_row(n, [&](std::int64_t i, std::int64_t k, int u) __attribute__((always_inline)) {
      const V v = load_some_of(px + i, k);
      sums[u] = fma(v, v, sums[u]);
    });
  }
  const float rstd = 1.0f / __builtin_sqrtf(total_of(sums) / static_cast<float>(n) + eps);
  const V r = set1(rstd);
  over_row(n, [&](std::int64_t i, std::int64_t k, int) __attribute__((always_inline)) {
    store_some_of(py + i, load_some_of(px + i, k) * r * load_some_of(pw + i, k), k);
  });
  return rstd;
}

// One row; its part of dweight is added to sums_of_weight (n).
template <class T>
void rms_backward(const void* dy, const void* x, const void* weight, float rstd, const void* extra, void* dx, void* y,
                  float* sums_of_weight, std::int64_t n) {
  const T *pd = static_cast<const T*>(dy), *px = static_cast<const T*>(x), *pw = static_cast<const T*>(weight);
  const T* pe = static_cast<const T*>(extra);
  T *po = static_cast<T*>(dx), *py = static_cast<T*>(y);
  const V r = set1(rstd);
  V sums[kSums];
  for (V& s : sums) s = set1(0.0f);
  over_row(n, [&](std::int64_t i, std::int64_t k, int u) __attribute__((always_inline)) {
    const V g = load_some_of(pd + i, k), normed = load_some_of(px + i, k) * r;
    const V gn = g * normed;
    store_some_of(sums_of_weight + i, load_some_of(sums_of_weight + i, k) + gn, k);
    sums[u] = fma(gn, load_some_of(pw + i, k), sums[u]);
  });
  const V mean = set1(total_of(sums) / static_cast<float>(n));
  over_row(n, [&](std::int64_t i, std::int64_t k, int) __attribute__((always_inline)) {
    const V w = load_some_of(pw + i, k), normed = load_some_of(px + i, k) * r;
    V d = r * (load_some_of(pd + i, k) * w - normed * mean);
    if (pe) d = d + load_some_of(pe + i, k);
    if (py) store_some_of(py + i, normed * w, k);
    store_some_of(po + i, d, k);
  });
}

template <class T>
void rope(void* row, const float* cos, const float* sin, std::int64_t heads, std::int64_t dim, float sign) {
  const std::int64_t half = dim / 2;
  const V turn = set1(sign);
  for (std::int64_t h = 0; h < heads; ++h) {
    T *a = static_cast<T*>(row) + h * dim, *b = a + half;
    for (std::int64_t i = 0; i < half; i += kWidth) {
      const std::int64_t k = half - i < kWidth ? half - i : kWidth;
      const V x = load_some_of(a + i, k), y = load_some_of(b + i, k);
      const V c = load_some_of(cos + i, k), s = load_some_of(sin + i, k) * turn;
      store_some_of(a + i, x * c - y * s, k);
      store_some_of(b + i, y * c + x * s, k);
    }
  }
}

FASTFT_INLINE V sigmoid(V x) {  // below -87 that of -87, which is 2e-38; NaN stays
  return set1(1.0f) / (set1(1.0f) + exp(set1(0.0f) - max(set1(-87.0f), x)));
}

template <class T>
void gated_forward(const void* gate, const void* up, void* out, std::int64_t n) {
  const T *pg = static_cast<const T*>(gate), *pu = static_cast<const T*>(up);
  T* po = static_cast<T*>(out);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const std::int64_t k = n - i < kWidth ? n - i : kWidth;
    const V g = load_some_of(pg + i, k);
    store_some_of(po + i, g * sigmoid(g) * load_some_of(pu + i, k), k);
  }
}

template <class T>
void gated_backward(const void* gate, const void* up, const void* dout, void* out, void* dgate, void* dup,
                    std::int64_t n) {
  const T *pg = static_cast<const T*>(gate), *pu = static_cast<const T*>(up), *pd = static_cast<const T*>(dout);
  T *po = static_cast<T*>(out), *qg = static_cast<T*>(dgate), *qu = static_cast<T*>(dup);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    const std::int64_t k = n - i < kWidth ? n - i : kWidth;
    const V g = load_some_of(pg + i, k), u = load_some_of(pu + i, k), d = load_some_of(pd + i, k);
    const V s = sigmoid(g), silu = g * s;
    if (po) store_some_of(po + i, silu * u, k);
    store_some_of(qg + i, d * u * s * (set1(1.0f) + g * (set1(1.0f) - s)), k);
    store_some_of(qu + i, d * silu, k);
  }
}
