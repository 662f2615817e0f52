// The kernel of cross_entropy_bulk.cuh on a CPU, as a function for tests/ops/test_cross_entropy_bulk.py:
// g++ -O2 -std=c++17 -ffp-contract=off -fno-strict-aliasing -DFASTFT_EMULATE_BULK -shared -fPIC
#include "../cuda/cross_entropy_bulk.cuh"

using namespace fastft::cuda::bulk;

namespace {

// Blocks a row * 100 + warps, as the launcher picks them; 0 when the row is too long.
template <class T, int WARPS, bool SMOOTH, bool CAP>
int run(Args a, int least, int clusters, unsigned seed) {
  using S = Shape<WARPS, SMOOTH>;
  const int ranks = plan<S>(a, sizeof(T), least);
  if (ranks == 0) return 0;
  emulate(clusters, ranks, S::threads, S::shared_bytes, seed, [&] { bulk_kernel<T, WARPS, SMOOTH, CAP>(a); });
  return ranks * 100 + WARPS;
}

template <class T, bool SMOOTH, bool CAP>
int run(const Args& a, int variant, int clusters, unsigned seed) {
  const int warps = variant % 100, least = variant < 100 ? 1 : variant / 100;
  if (warps != 16) {
    if (const int used = run<T, 8, SMOOTH, CAP>(a, least, clusters, seed)) return used;
  }
  return warps == 8 ? 0 : run<T, 16, SMOOTH, CAP>(a, least, clusters, seed);
}

template <class T>
int run(const Args& a, int variant, int clusters, unsigned seed) {
  if (a.softcap != 0.0f) return run<T, false, true>(a, variant, clusters, seed);
  if (a.label_smoothing != 0.0f) return run<T, true, false>(a, variant, clusters, seed);
  return run<T, false, false>(a, variant, clusters, seed);
}

}  // namespace

struct Call {  // tests/ops/test_cross_entropy_bulk.py has the same fields
  const void* logits;
  void* grad;
  const std::int64_t* target;
  float *loss, *lse;
  const float *class_weight, *token_weight, *grad_scale;
  std::int64_t* bad_row;
  std::int64_t rows, vocab, logits_stride, grad_stride, ignore_index, token_weight_stride, grad_scale_stride;
  float label_smoothing, z_loss, softcap, logit_scale;
  int is_bf16, variant, clusters, seed;
};

extern "C" int emulated_cross_entropy_bulk(const Call* c) {
  Args a{};
  a.logits = c->logits;
  a.grad = c->grad;
  a.target = c->target;
  a.loss = c->loss;
  a.lse = c->lse;
  a.class_weight = c->class_weight;
  a.token_weight = c->token_weight;
  a.grad_scale = c->grad_scale;
  a.bad_row = c->bad_row;
  a.rows = c->rows;
  a.logits_stride = c->logits_stride;
  a.grad_stride = c->grad_stride;
  a.ignore_index = c->ignore_index;
  a.token_weight_stride = c->token_weight_stride;
  a.grad_scale_stride = c->grad_scale_stride;
  a.vocab = static_cast<int>(c->vocab);
  a.label_smoothing = c->label_smoothing;
  a.z_loss = c->z_loss;
  a.softcap = c->softcap;
  a.logit_scale = c->logit_scale;
  return c->is_bf16 ? run<fastft::bf16>(a, c->variant, c->clusters, static_cast<unsigned>(c->seed))
                    : run<float>(a, c->variant, c->clusters, static_cast<unsigned>(c->seed));
}
