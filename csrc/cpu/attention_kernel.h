// Causal attention of one document and one group of heads, forward and backward. Included once per instruction set,
// inside that ISA's namespace.
//
// A block of queries (all heads of the group together) meets a block of keys. Products of queries and keys are held
// the other way round, keys by queries, in panels of kPanel queries: softmax then runs along lanes without a reduction,
// and the same panels are operands of the next products as they lie. A panel and the keys' block stay in the L1 cache.
// Masked products are skipped by panels and groups of kTileRows keys; what is left of them is 0.

constexpr int kVectors = kWidth == 1 ? 8 : 2;                       // of a tile's row
constexpr std::int64_t kPanel = kVectors * kWidth;                  // a tile's columns
constexpr int kTileRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : 4;  // 12 of 16, 24 of 32 registers add up
static_assert(kAttentionKeys % kTileRows == 0, "tiles of the keys of a block");

FASTFT_INLINE std::int64_t panels_of(std::int64_t n) { return (n + kPanel - 1) / kPanel; }

// c (R, kPanel) = [c +] sum of a(i, k) b(k, :), for `blocks` times n values of k. With ADD the sum is taken first: one
// chain of additions over all of a long document would lose a digit. a(i, k) is a[i * lda + k], or with
// UNIT_ROWS a[i + k * lda]; the next n begin a_block further. Rows of b lie ldb apart.
template <int R, bool UNIT_ROWS, bool ADD>
FASTFT_INLINE void tile(const float* a, std::int64_t lda, std::int64_t a_block, const float* b, std::int64_t ldb,
                        std::int64_t blocks, std::int64_t n, float* c, std::int64_t ldc) {
  V sums[R][kVectors];
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = set1(0.0f);
  }
  for (std::int64_t block = 0; block < blocks; ++block, a += a_block) {
    for (std::int64_t k = 0; k < n; ++k, b += ldb) {
      V x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load(b + v * kWidth);
      for (int i = 0; i < R; ++i) {
        const V y = set1(UNIT_ROWS ? a[k * lda + i] : a[i * lda + k]);
        for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(y, x[v], sums[i][v]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + i * ldc + v * kWidth;
      store(at, ADD ? load(at) + sums[i][v] : sums[i][v]);
    }
  }
}

template <int R, bool UNIT_ROWS, bool ADD>
FASTFT_INLINE void tile_of(std::int64_t rows, const float* a, std::int64_t lda, std::int64_t a_block, const float* b,
                           std::int64_t ldb, std::int64_t blocks, std::int64_t n, float* c, std::int64_t ldc) {
  if (rows == R) return tile<R, UNIT_ROWS, ADD>(a, lda, a_block, b, ldb, blocks, n, c, ldc);
  if constexpr (R > 1) tile_of<R - 1, UNIT_ROWS, ADD>(rows, a, lda, a_block, b, ldb, blocks, n, c, ldc);
}

// `rows` rows of c, at most kTileRows at a time
template <bool UNIT_ROWS, bool ADD>
void tiles(std::int64_t rows, const float* a, std::int64_t lda, std::int64_t a_block, const float* b, std::int64_t ldb,
           std::int64_t blocks, std::int64_t n, float* c, std::int64_t ldc) {
  std::int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    tile<kTileRows, UNIT_ROWS, ADD>(a + (UNIT_ROWS ? i : i * lda), lda, a_block, b, ldb, blocks, n, c + i * ldc, ldc);
  }
  if (i < rows) {
    tile_of<kTileRows - 1, UNIT_ROWS, ADD>(rows - i, a + (UNIT_ROWS ? i : i * lda), lda, a_block, b, ldb, blocks, n,
                                           c + i * ldc, ldc);
  }
}

// One head of one token as float32, times scale, filled up with zeros
template <class T>
FASTFT_INLINE void read_head(const T* p, std::int64_t dim, float scale, float* to, std::int64_t width) {
  const V s = set1(scale);
  std::int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) store(to + i, load(p + i) * s);
  if (i < dim) store_n(to + i, load_n(p + i, dim - i) * s, dim - i);
  for (i = dim; i < width; ++i) to[i] = 0.0f;
}

template <class T>
FASTFT_INLINE void write_head(const float* p, std::int64_t dim, float scale, T* to) {
  const V s = set1(scale);
  std::int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) store(to + i, load(p + i) * s);
  if (i < dim) store_n(to + i, load_n(p + i, dim - i) * s, dim - i);
}

template <class T>
void read_keys(const void* p, std::int64_t stride, std::int64_t first, std::int64_t count, std::int64_t dim, float* to,
               std::int64_t width) {
  for (std::int64_t i = 0; i < count; ++i) {
    read_head(static_cast<const T*>(p) + (first + i) * stride, dim, 1.0f, to + i * width, width);
  }
}

// A block of queries, or of gradients of their results: rows (token, head), and the same by panels of columns
template <class T>
void read_queries(const void* p, std::int64_t stride, const AttentionGroup& g, std::int64_t first, std::int64_t count,
                  float scale, float* rows, std::int64_t width, float* columns) {
  const std::int64_t m = count * g.ratio, all = panels_of(m) * kPanel;
  for (std::int64_t i = 0; i < m; ++i) {
    const T* head = static_cast<const T*>(p) + (first + i / g.ratio) * stride + i % g.ratio * g.dim;
    read_head(head, g.dim, scale, rows + i * width, width);
  }
  for (std::int64_t i = m * width; i < all * width; ++i) rows[i] = 0.0f;
  for (std::int64_t panel = 0; panel < all; panel += kPanel, columns += kPanel * g.dim) {
    const float* from = rows + panel * width;
    for (std::int64_t d = 0; d < g.dim; ++d) {
      for (std::int64_t i = 0; i < kPanel; ++i) columns[d * kPanel + i] = from[i * width + d];
    }
  }
}

// The tokens of a block of queries, by lane; and which keys of a block a panel of them needs.
struct QueryBlock {
  const AttentionGroup& g;
  std::int64_t first, count, m, panels;

  QueryBlock(const AttentionGroup& group, std::int64_t at, std::int64_t tokens)
      : g(group), first(at), count(tokens), m(tokens * group.ratio), panels(panels_of(m)) {}

  std::int64_t lowest(std::int64_t p) const { return first + p * kPanel / g.ratio; }
  std::int64_t highest(std::int64_t p) const {
    const std::int64_t last = (p + 1) * kPanel - 1;
    return first + (last < m ? last : m - 1) / g.ratio;
  }
  // Keys of the block from `key` on that the panel computes, some of which it masks
  std::int64_t keys(std::int64_t p, std::int64_t key, std::int64_t size) const {
    const std::int64_t seen = highest(p) + 1 - key;
    const std::int64_t whole = (seen + kTileRows - 1) / kTileRows * kTileRows;
    return seen <= 0 ? 0 : whole < size ? whole : size;
  }
  // The first key that any of the block sees
  std::int64_t begin() const { return g.window > 0 && first >= g.window ? first - g.window + 1 : 0; }
  // Whether the window of every query of the panel begins behind all of these keys
  bool behind(std::int64_t p, std::int64_t key, std::int64_t size) const {
    return g.window > 0 && lowest(p) - g.window + 1 > key + size - 1;
  }
  bool masked(std::int64_t p, std::int64_t key, std::int64_t used) const {
    return key + used - 1 > lowest(p) || (g.window > 0 && key < highest(p) - g.window + 1);
  }
  void tokens(float* lanes) const {
    for (std::int64_t i = 0; i < panels * kPanel; ++i) {
      lanes[i] = static_cast<float>(first + (i < m ? i : m - 1) / g.ratio);
    }
  }
};

// Whether lanes see a key: tokens in `low` .. `high`
struct Sees {
  V token, low;

  Sees(const float* tokens, std::int64_t window)
      : token(load(tokens)), low(window > 0 ? token - set1(static_cast<float>(window - 1)) : set1(-1.0f)) {}
  inline __attribute__((always_inline)) V where(float key, V yes, float no) const {
    const V k = set1(key);
    return select_less(token, k, set1(no), select_less(k, low, set1(no), yes));
  }
};

// Online softmax over a panel's products p (used, kPanel), which become exp(p - top). top and sum go on from the blocks
// before; fade receives the factor of what those added up.
template <bool MASKED>
FASTFT_INLINE void softmax_panel(float* p, std::int64_t used, std::int64_t key, const float* tokens,
                                 std::int64_t window, float* top, float* sum, float* fade) {
  V high[kVectors], reference[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) high[v] = load(top + v * kWidth);
  for (std::int64_t j = 0; j < used; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = p + j * kPanel + v * kWidth;
      V x = load(at);
      if (MASKED) {
        x = Sees(tokens + v * kWidth, window).where(static_cast<float>(key + j), x, -__builtin_inff());
        store(at, x);
      }
      high[v] = max(x, high[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {  // all -inf so far: any finite reference gives exp(-inf) = 0, and NaN stays
    reference[v] = select_less(set1(-__builtin_inff()), high[v], high[v], set1(0.0f));
    const V factor = exp(load(top + v * kWidth) - reference[v]);
    store(fade + v * kWidth, factor);
    store(top + v * kWidth, high[v]);
    total[v] = load(sum + v * kWidth) * factor;
  }
  for (std::int64_t j = 0; j < used; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = p + j * kPanel + v * kWidth;
      const V e = exp(load(at) - reference[v]);
      store(at, e);
      total[v] = total[v] + e;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sum + v * kWidth, total[v]);
}

// p: products of queries and keys, becomes probabilities; d: products of gradients and values, becomes gradients of the
// former. (used, kPanel) both; row_dot: gradient times result of each query.
template <bool MASKED>
FASTFT_INLINE void gradient_panel(float* p, float* d, std::int64_t used, std::int64_t key, const float* tokens,
                                  std::int64_t window, const float* lse, const float* row_dot) {
  for (std::int64_t j = 0; j < used; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float *at = p + j * kPanel + v * kWidth, *dt = d + j * kPanel + v * kWidth;
      V e = exp(load(at) - load(lse + v * kWidth));
      V s = e * (load(dt) - load(row_dot + v * kWidth));
      if (MASKED) {
        const Sees sees(tokens + v * kWidth, window);
        e = sees.where(static_cast<float>(key + j), e, 0.0f);
        s = sees.where(static_cast<float>(key + j), s, 0.0f);
      }
      store(at, e);
      store(dt, s);
    }
  }
}

struct Floats {  // hands out pieces of the scratch
  float* at;
  float* take(std::int64_t n) {
    float* found = at;
    at += (n + 15) / 16 * 16;
    return found;
  }
};

std::int64_t attention_scratch(std::int64_t ratio, std::int64_t dim, std::int64_t keys) {
  const std::int64_t m = panels_of(attention_queries(ratio) * ratio) * kPanel, width = panels_of(dim) * kPanel;
  const std::int64_t blocks = keys + kAttentionKeys;
  return m * (5 * width + 2 * kAttentionKeys + 5) + 4 * blocks * width + 16 * 32;
}

template <class T>
void attention_forward(const AttentionGroup& g, std::int64_t first, std::int64_t count, float* scratch) {
  const QueryBlock block(g, first, count);
  const std::int64_t width = panels_of(g.dim) * kPanel, lanes = block.panels * kPanel;
  Floats floats{scratch};
  float *out = floats.take(lanes * width), *columns = floats.take(lanes * g.dim);
  float *keys = floats.take(kAttentionKeys * width), *values = floats.take(kAttentionKeys * width);
  float *products = floats.take(kAttentionKeys * kPanel), *tokens = floats.take(lanes), *top = floats.take(lanes);
  float *sum = floats.take(lanes), *fade = floats.take(kPanel);
  read_queries<T>(g.q, g.q_stride, g, first, count, g.scale, out, width, columns);
  for (std::int64_t i = 0; i < lanes * width; ++i) out[i] = 0.0f;
  for (std::int64_t i = 0; i < lanes; ++i) {
    top[i] = -__builtin_inff();
    sum[i] = 0.0f;
  }
  block.tokens(tokens);
  const std::int64_t end = first + count;
  for (std::int64_t key = block.begin() / kAttentionKeys * kAttentionKeys; key < end; key += kAttentionKeys) {
    const std::int64_t size = end - key < kAttentionKeys ? end - key : kAttentionKeys;
    read_keys<T>(g.k, g.k_stride, key, size, g.dim, keys, width);
    read_keys<T>(g.v, g.v_stride, key, size, g.dim, values, width);
    for (std::int64_t p = 0; p < block.panels; ++p) {
      const std::int64_t used = block.keys(p, key, size), lane = p * kPanel;
      if (used == 0 || block.behind(p, key, size)) continue;
      tiles<false, false>(used, keys, width, 0, columns + lane * g.dim, kPanel, 1, g.dim, products, kPanel);
      if (block.masked(p, key, used)) {
        softmax_panel<true>(products, used, key, tokens + lane, g.window, top + lane, sum + lane, fade);
      } else {
        softmax_panel<false>(products, used, key, tokens + lane, g.window, top + lane, sum + lane, fade);
      }
      float* rows = out + lane * width;
      for (std::int64_t i = 0; i < kPanel; ++i) {
        const V factor = set1(fade[i]);
        for (std::int64_t j = 0; j < width; j += kWidth)
          store(rows + i * width + j, load(rows + i * width + j) * factor);
      }
      for (std::int64_t j = 0; j < width; j += kPanel) {
        tiles<true, true>(kPanel, products, kPanel, 0, values + j, width, 1, used, rows + j, width);
      }
    }
  }
  for (std::int64_t i = 0; i < block.m; ++i) {
    const std::int64_t token = first + i / g.ratio, head = i % g.ratio;
    write_head(out + i * width, g.dim, 1.0f / sum[i], static_cast<T*>(g.out) + token * g.out_stride + head * g.dim);
    g.lse[token * g.lse_stride + head] = top[i] + __builtin_logf(sum[i]);
  }
}

template <class T>
void attention_backward(const AttentionGroup& g, const AttentionPart& part, float* scratch) {
  const std::int64_t width = panels_of(g.dim) * kPanel, step = attention_queries(g.ratio);
  const std::int64_t most = panels_of(step * g.ratio) * kPanel;
  const std::int64_t stored = part.keys ? part.key_end - part.key_begin : kAttentionKeys;
  Floats floats{scratch};
  float *rows = floats.take(most * width), *grads = floats.take(most * width), *dq = floats.take(most * width);
  float *columns = floats.take(most * g.dim), *grad_columns = floats.take(most * g.dim);
  float *probabilities = floats.take(most * kAttentionKeys), *products = floats.take(most * kAttentionKeys);
  float *tokens = floats.take(most), *lse = floats.take(most), *row_dot = floats.take(most);
  float *keys = floats.take(stored * width), *values = floats.take(stored * width);
  float *dk = nullptr, *dv = nullptr;
  if (part.keys) {
    dk = floats.take(stored * width), dv = floats.take(stored * width);
    for (std::int64_t i = 0; i < stored * width; ++i) dk[i] = dv[i] = 0.0f;
    read_keys<T>(g.k, g.k_stride, part.key_begin, stored, g.dim, keys, width);
    read_keys<T>(g.v, g.v_stride, part.key_begin, stored, g.dim, values, width);
  }
  for (std::int64_t first = part.query_begin; first < part.query_end; first += step) {
    const QueryBlock block(g, first, part.query_end - first < step ? part.query_end - first : step);
    std::int64_t begin = block.begin() / kAttentionKeys * kAttentionKeys, end = first + block.count;
    if (begin < part.key_begin) begin = part.key_begin;
    if (end > part.key_end) end = part.key_end;
    if (begin >= end) continue;
    read_queries<T>(g.q, g.q_stride, g, first, block.count, g.scale, rows, width, columns);
    read_queries<T>(g.grad, g.out_stride, g, first, block.count, 1.0f, grads, width, grad_columns);
    block.tokens(tokens);
    for (std::int64_t i = 0; i < block.panels * kPanel; ++i) {
      lse[i] = row_dot[i] = 0.0f;
      if (i >= block.m) continue;
      const std::int64_t token = first + i / g.ratio, head = i % g.ratio;
      const T* out = static_cast<const T*>(g.out) + token * g.out_stride + head * g.dim;
      V sum = set1(0.0f);
      for (std::int64_t j = 0; j < g.dim; j += kWidth) {
        const std::int64_t k = g.dim - j < kWidth ? g.dim - j : kWidth;
        sum = fma(load_some_of(out + j, k), load_some_of(grads + i * width + j, k), sum);
      }
      row_dot[i] = reduce_add(sum);
      lse[i] = g.lse[token * g.lse_stride + head];
    }
    if (part.queries) {
      for (std::int64_t i = 0; i < block.panels * kPanel * width; ++i) dq[i] = 0.0f;
    }
    for (std::int64_t key = begin; key < end; key += kAttentionKeys) {
      const std::int64_t whole = g.tokens - key, size = whole < kAttentionKeys ? whole : kAttentionKeys;
      const float *k = keys, *v = values;
      if (part.keys) {
        k += (key - part.key_begin) * width, v += (key - part.key_begin) * width;
      } else {
        read_keys<T>(g.k, g.k_stride, key, size, g.dim, keys, width);
        read_keys<T>(g.v, g.v_stride, key, size, g.dim, values, width);
      }
      std::int64_t from = 0, to = block.panels;
      while (from < to && block.keys(from, key, size) == 0) ++from;
      while (to > from && block.behind(to - 1, key, size)) --to;
      for (std::int64_t p = from; p < to; ++p) {
        const std::int64_t used = block.keys(p, key, size), lane = p * kPanel;
        float *pp = probabilities + lane * kAttentionKeys, *pd = products + lane * kAttentionKeys;
        tiles<false, false>(used, k, width, 0, columns + lane * g.dim, kPanel, 1, g.dim, pp, kPanel);
        tiles<false, false>(used, v, width, 0, grad_columns + lane * g.dim, kPanel, 1, g.dim, pd, kPanel);
        if (block.masked(p, key, used)) {
          gradient_panel<true>(pp, pd, used, key, tokens + lane, g.window, lse + lane, row_dot + lane);
        } else {
          gradient_panel<false>(pp, pd, used, key, tokens + lane, g.window, lse + lane, row_dot + lane);
        }
        for (std::int64_t j = 0; part.queries && j < width; j += kPanel) {
          tiles<true, true>(kPanel, pd, kPanel, 0, k + j, width, 1, used, dq + lane * width + j, width);
        }
      }
      for (std::int64_t j = 0; part.keys && j < size; j += kTileRows) {
        std::int64_t p = from;  // panels that computed this group of keys: all from the first one on
        while (p < to && block.keys(p, key, size) <= j) ++p;
        const std::int64_t here = size - j < kTileRows ? size - j : kTileRows;
        const std::int64_t at = p * kPanel * kAttentionKeys + j * kPanel, row = (key - part.key_begin + j) * width;
        for (std::int64_t c = 0; p < to && c < width; c += kPanel) {
          tiles<false, true>(here, probabilities + at, kPanel, kPanel * kAttentionKeys, grads + p * kPanel * width + c,
                             width, to - p, kPanel, dv + row + c, width);
          tiles<false, true>(here, products + at, kPanel, kPanel * kAttentionKeys, rows + p * kPanel * width + c, width,
                             to - p, kPanel, dk + row + c, width);
        }
      }
    }
    for (std::int64_t i = 0; part.queries && i < block.m; ++i) {
      T* to = static_cast<T*>(g.dq) + (first + i / g.ratio) * g.dq_stride + i % g.ratio * g.dim;
      write_head(dq + i * width, g.dim, g.scale, to);
    }
  }
  for (std::int64_t i = 0; part.keys && i < stored; ++i) {
    const std::int64_t token = part.key_begin + i;
    write_head(dk + i * width, g.dim, 1.0f, static_cast<T*>(g.dk) + token * g.dk_stride);
    write_head(dv + i * width, g.dim, 1.0f, static_cast<T*>(g.dv) + token * g.dv_stride);
  }
}
