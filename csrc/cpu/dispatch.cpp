// Picks the instruction set at run time.
#include <omp.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "parallel.h"

namespace fastft::cpu {

Features features() {
  Features f{};
#ifdef FASTFT_X86
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2");
  f.fma = __builtin_cpu_supports("fma");
  f.f16c = __builtin_cpu_supports("f16c");
  f.avx512f = __builtin_cpu_supports("avx512f");
  f.avx512bw = __builtin_cpu_supports("avx512bw");
  f.avx512vl = __builtin_cpu_supports("avx512vl");
  f.avx512dq = __builtin_cpu_supports("avx512dq");
  f.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#endif
  return f;
}

static const Kernels& select() {
  const Kernels* best = &kernels_scalar;
  const char* forced = std::getenv("FASTFT_CPU");
  const std::string want = forced ? forced : "";
  bool can_avx2 = false, can_avx512 = false;
#ifdef FASTFT_X86
  const Features f = features();
  can_avx2 = f.avx2 && f.fma;
  can_avx512 = can_avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  if (can_avx512 && want != "avx2" && want != "scalar") {
    best = &kernels_avx512;
  } else if (can_avx2 && want != "scalar") {
    best = &kernels_avx2;
  }
#endif
  if (want.empty() || want == "scalar") return *best;
  if (want != "avx2" && want != "avx512") {
    throw std::invalid_argument("FASTFT_CPU=" + want + " is not known; use scalar, avx2 or avx512");
  }
  if (!(want == "avx2" ? can_avx2 : can_avx512)) {
    throw std::invalid_argument("FASTFT_CPU=" + want + ", but this CPU (or this build) has no " + want);
  }
  return *best;
}

const Kernels& kernels() {
  static const Kernels& chosen = select();  // a throw leaves it unset, so the next call throws again
  return chosen;
}

int thread_count(int requested) { return requested > 0 ? requested : omp_get_max_threads(); }

void stream_4r3w(float* p, const float* g, float* m, float* v, std::int64_t n, int num_threads) {
  const Kernels& k = kernels();
  constexpr std::int64_t chunk = 16384;
  const std::int64_t chunks = (n + chunk - 1) / chunk;
  for_each_stealing(chunks, thread_count(num_threads), [&](std::int64_t c) {
    const std::int64_t at = c * chunk;
    k.stream(p + at, g + at, m + at, v + at, n - at < chunk ? n - at : chunk);
  });
}

}  // namespace fastft::cpu
