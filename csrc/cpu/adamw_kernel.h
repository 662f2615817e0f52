// AdamW over one contiguous piece. Included once per instruction set, inside that ISA's namespace.

struct AdamWVectors {
  V grad_factor, decay, l2, lerp, beta2, one_minus_beta2, inv_sqrt_bc2, eps, step_size;
  bool from_grad, use_l2;
};

FASTFT_INLINE AdamWVectors broadcast(const AdamWScalars& s) {
  // As torch's lerp: start from the nearer end, so that beta1 = 0 gives exactly the gradient.
  const bool from_grad = s.one_minus_beta1 >= 0.5f;
  return {set1(s.grad_factor),  set1(s.decay),
          set1(s.l2),           set1(from_grad ? -s.beta1 : s.one_minus_beta1),
          set1(s.beta2),        set1(s.one_minus_beta2),
          set1(s.inv_sqrt_bc2), set1(s.eps),
          set1(s.step_size),    from_grad,
          s.l2 != 0.0f};
}

// kAll: a whole vector; otherwise the first k lanes. Lanes that are not loaded are 0.
template <bool kAll, class T>
FASTFT_INLINE auto get(const T* p, std::int64_t i, std::int64_t k) {
  return kAll ? load(p + i) : load_n(p + i, k);
}
template <bool kAll, class T, class X>
FASTFT_INLINE void put(T* p, X x, std::int64_t i, std::int64_t k) {
  kAll ? store(p + i, x) : store_n(p + i, x, k);
}

struct Elements {
  V p, m, v;
};

// The update itself. vmax: of type S, or null
template <bool kAll, class S>
FASTFT_INLINE void update(Elements& e, V g, S* vmax, const AdamWVectors& s, std::int64_t i, std::int64_t k) {
  g = g * s.grad_factor;
  if (s.use_l2) g = fma(s.l2, e.p, g);
  e.p = e.p * s.decay;
  e.m = fma(s.lerp, g - e.m, s.from_grad ? g : e.m);
  e.v = fma(s.one_minus_beta2 * g, g, s.beta2 * e.v);
  V second = e.v;
  if (vmax) {
    second = max(get<kAll>(vmax, i, k), e.v);
    put<kAll>(vmax, second, i, k);
  }
  const V denom = fma(sqrt(second), s.inv_sqrt_bc2, s.eps);
  e.p = fnma(s.step_size, e.m / denom, e.p);
}

template <class P, ParamStore kStore, bool kAll>
FASTFT_INLINE V get_param(const AdamWChunk& c, std::int64_t i, std::int64_t k) {
  const V p = get<kAll>(static_cast<const P*>(c.param), i, k);
  if constexpr (kStore == ParamStore::remainder) return join(p, get<kAll>(c.remainder, i, k));
  return p;
}

// random: random_first(), which only the stochastic store reads
template <class P, ParamStore kStore, bool kAll>
FASTFT_INLINE void put_param(const AdamWChunk& c, V p, I random, std::int64_t i, std::int64_t k) {
  std::uint16_t* upper = static_cast<std::uint16_t*>(c.param);
  if constexpr (kStore == ParamStore::stochastic) {
    put<kAll>(upper, round_stochastic(p, shift_right<16>(random)), i, k);
  } else if constexpr (kStore == ParamStore::remainder) {
    put<kAll>(upper, upper_half(p), i, k);
    put<kAll>(reinterpret_cast<std::uint16_t*>(c.remainder), lower_half(p), i, k);
  } else {
    put<kAll>(static_cast<P*>(c.param), p, i, k);
  }
  if (c.copy) put<kAll>(c.copy, p, i, k);
}

template <class P, class G, ParamStore kStore, class S, bool kAll>
FASTFT_INLINE void adamw_vector(const AdamWChunk& c, const AdamWVectors& s, const RandomKeys& keys, std::int64_t i,
                                std::int64_t k) {
  S *m = static_cast<S*>(c.m), *v = static_cast<S*>(c.v);
  Elements e{get_param<P, kStore, kAll>(c, i, k), get<kAll>(m, i, k), get<kAll>(v, i, k)};
  update<kAll>(e, get<kAll>(static_cast<const G*>(c.grad), i, k), static_cast<S*>(c.vmax), s, i, k);
  constexpr bool kHalfState = sizeof(S) == 2;
  const I random = kHalfState || kStore == ParamStore::stochastic ? random_first(keys, i) : set1i(0);
  if constexpr (kHalfState) {
    put<kAll>(reinterpret_cast<std::uint16_t*>(m), round_stochastic(e.m, low16(random)), i, k);
    put<kAll>(reinterpret_cast<std::uint16_t*>(v), round_stochastic(e.v, shift_right<16>(random_second(random))), i, k);
  } else {
    put<kAll>(m, e.m, i, k);
    put<kAll>(v, e.v, i, k);
  }
  put_param<P, kStore, kAll>(c, e.p, random, i, k);
}

// The same for kCount vectors at once, each array in one stretch: all loads before the first store.
template <class P, class G, int kCount>
FASTFT_INLINE void adamw_vectors(const AdamWChunk& c, const AdamWVectors& s, std::int64_t i) {
  float *m = static_cast<float*>(c.m), *v = static_cast<float*>(c.v);
  P* p = static_cast<P*>(c.param);
  Elements e[kCount];
  V g[kCount];
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) e[u].p = load(p + i + u * kWidth);
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) g[u] = load(static_cast<const G*>(c.grad) + i + u * kWidth);
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) e[u].m = load(m + i + u * kWidth);
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) e[u].v = load(v + i + u * kWidth);
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) update<true>(e[u], g[u], static_cast<float*>(nullptr), s, i, kWidth);
#pragma GCC unroll 8
  for (int u = 0; u < kCount; ++u) {
    store(p + i + u * kWidth, e[u].p);
    store(m + i + u * kWidth, e[u].m);
    store(v + i + u * kWidth, e[u].v);
    if (c.copy) store(c.copy + i + u * kWidth, e[u].p);
  }
}

// What a block's new state waits in until its largest number, and with it the scale, is known: 4 KiB of the first-level
// cache
struct BlockScratch {
  alignas(64) float m[kStateBlock], v[kStateBlock];
  alignas(64) std::uint32_t random_m[kStateBlock], random_v[kStateBlock];  // at the 20 bits that a code drops
};

struct Tops {
  I m, v;
};

template <class P, class G, ParamStore kStore, bool kAll>
FASTFT_INLINE void block_vector(const AdamWChunk& c, const AdamWVectors& s, const RandomKeys& keys,
                                BlockScratch& scratch, Tops& tops, std::int64_t begin, std::int64_t j, std::int64_t k) {
  const std::int64_t i = begin + j, block = begin / kStateBlock;
  Elements e{get_param<P, kStore, kAll>(c, i, k),
             decode<true>(get<kAll>(static_cast<const std::uint8_t*>(c.m), i, k), set1(c.m_scale[block])),
             decode<false>(get<kAll>(static_cast<const std::uint8_t*>(c.v), i, k), set1(c.v_scale[block]))};
  update<kAll>(e, get<kAll>(static_cast<const G*>(c.grad), i, k), static_cast<float*>(nullptr), s, i, k);
  const I random = random_first(keys, i);
  const I random_m = shift_left<4>(low16(random)), random_v = shift_left<4>(shift_right<16>(random_second(random)));
  tops = {imax(tops.m, iadd(bits(abs(e.m)), random_m)), imax(tops.v, iadd(bits(e.v), random_v))};
  store(scratch.m + j, e.m);
  store(scratch.v + j, e.v);
  store(scratch.random_m + j, random_m);
  store(scratch.random_v + j, random_v);
  put_param<P, kStore, kAll>(c, e.p, random, i, k);
}

template <bool kSigned>
FASTFT_INLINE void encode_block(std::uint8_t* codes, float* scale, const float* x, const std::uint32_t* random, I tops,
                                std::int64_t n) {
  const BlockScale b = block_scale(tops);
  *scale = b.scale;
  const V inverse = set1(b.inverse);
  const auto code = [&](std::int64_t j) __attribute__((always_inline)) {
    return b.broken ? set1i(0) : encode<kSigned>(load(x + j), load(random + j), inverse);
  };
  std::int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) store(codes + j, code(j));
  if (j < n) store_n(codes + j, code(j), n - j);
}

template <class P, class G, ParamStore kStore>
FASTFT_INLINE void adamw_blocks(const AdamWChunk& c, const AdamWVectors& s, const RandomKeys& keys) {
  BlockScratch scratch;
  std::uint8_t *m = static_cast<std::uint8_t*>(c.m), *v = static_cast<std::uint8_t*>(c.v);
  for (std::int64_t begin = 0; begin < c.n; begin += kStateBlock) {
    const std::int64_t n = c.n - begin < kStateBlock ? c.n - begin : kStateBlock, block = begin / kStateBlock;
    Tops tops{set1i(0), set1i(0)};
    std::int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
      block_vector<P, G, kStore, true>(c, s, keys, scratch, tops, begin, j, kWidth);
    }
    if (j < n) block_vector<P, G, kStore, false>(c, s, keys, scratch, tops, begin, j, n - j);
    encode_block<true>(m + begin, c.m_scale + block, scratch.m, scratch.random_m, tops.m, n);
    encode_block<false>(v + begin, c.v_scale + block, scratch.v, scratch.random_v, tops.v, n);
  }
}

template <class P, class G, ParamStore kStore, class S>
void adamw_chunk(const AdamWChunk& chunk, const AdamWScalars& given) {
  // Copies: a store through uint8_t* could change what a reference points to, and all of it would be loaded again for
  // each vector.
  const AdamWChunk c = chunk;
  const AdamWScalars scalars = given;
  const AdamWVectors s = broadcast(scalars);
  const RandomKeys keys = random_keys(scalars.random, c.position);
  if constexpr (sizeof(S) == 1) {
    adamw_blocks<P, G, kStore>(c, s, keys);
  } else {
    std::int64_t i = 0;
    if constexpr (sizeof(S) == 4 && kStore == ParamStore::nearest) {
      constexpr int kUnroll = 4;
      for (; !c.vmax && i + kUnroll * kWidth <= c.n; i += kUnroll * kWidth) adamw_vectors<P, G, kUnroll>(c, s, i);
    }
    for (; i + kWidth <= c.n; i += kWidth) {
      adamw_vector<P, G, kStore, S, true>(c, s, keys, i, kWidth);
    }
    if (i < c.n) adamw_vector<P, G, kStore, S, false>(c, s, keys, i, c.n - i);
  }
}

// One row of the table in kernels.h: [grad dtype][state]
#define FASTFT_ADAMW(isa, P, store)                                                                               \
  {                                                                                                               \
      {isa::adamw_chunk<P, float, ParamStore::store, float>, isa::adamw_chunk<P, float, ParamStore::store, bf16>, \
       isa::adamw_chunk<P, float, ParamStore::store, std::uint8_t>},                                              \
      {isa::adamw_chunk<P, bf16, ParamStore::store, float>, isa::adamw_chunk<P, bf16, ParamStore::store, bf16>,   \
       isa::adamw_chunk<P, bf16, ParamStore::store, std::uint8_t>},                                               \
  }

// Reads and writes what fp32 AdamW does, with three additions in place of its arithmetic.
void stream_chunk(float* p, const float* g, float* m, float* v, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const V x = load(g + i);
    store(p + i, load(p + i) + x);
    store(m + i, load(m + i) + x);
    store(v + i, load(v + i) + x);
  }
  for (; i < n; ++i) {
    p[i] += g[i];
    m[i] += g[i];
    v[i] += g[i];
  }
}
