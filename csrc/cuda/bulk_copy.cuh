// What kernels of sm_90 and later need to move memory in bulk: one PTX instruction a function. Bulk copies run beside
// the threads, between global and shared memory; an mbarrier in shared memory says when their bytes have arrived, or
// when threads have come by. Names and meaning: PTX ISA, "Asynchronous copy" and "mbarrier".
//
// csrc/tests/emulate/bulk_copy.h has the same functions for a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define FASTFT_DEVICE __device__ __forceinline__

namespace fastft::cuda::bulk {

FASTFT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTFT_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTFT_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FASTFT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bulk_shared_memory[];
  return bulk_shared_memory;
}
FASTFT_DEVICE void sync_warp() { __syncwarp(); }
FASTFT_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
FASTFT_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FASTFT_DEVICE void atomic_min(std::int64_t* p, std::int64_t x) {  // as unsigned numbers
  atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
FASTFT_DEVICE float as_float(unsigned x) { return __uint_as_float(x); }
FASTFT_DEVICE unsigned as_bits(float x) { return __float_as_uint(x); }

// Most of what follows does not exist before sm_90: kernels that call it need an empty body there.
FASTFT_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
FASTFT_DEVICE int cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
}
FASTFT_DEVICE int cluster_size() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return static_cast<int>(r);
}
// All threads of all blocks of the cluster. Each warp has to come as a whole.
FASTFT_DEVICE void sync_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

FASTFT_DEVICE void barrier_init(std::uint64_t* b, int arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n\t"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(b)),
      "r"(arrivals)
      : "memory");
}
FASTFT_DEVICE void barrier_arrive(std::uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and tells the barrier to wait for so many bytes too. Bytes may come before they are expected.
FASTFT_DEVICE void barrier_expect(std::uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity is over; the first phase of a barrier has parity 0.
#define FASTFT_BARRIER_WAIT(name, scope)                       \
  FASTFT_DEVICE void name(std::uint64_t* b, unsigned parity) { \
    asm volatile(                                              \
        "{\n\t.reg .pred over;\n\tAGAIN:\n\t"                  \
        "mbarrier.try_wait.parity.acquire." scope              \
        ".shared::cta.b64 over, [%0], %1;\n\t"                 \
        "@!over bra AGAIN;\n\t}" ::"r"(shared_address(b)),     \
        "r"(parity)                                            \
        : "memory");                                           \
  }
FASTFT_BARRIER_WAIT(barrier_wait, "cta")
FASTFT_BARRIER_WAIT(barrier_wait_cluster, "cluster")
#undef FASTFT_BARRIER_WAIT

// Addresses and bytes are multiples of 16, and bytes is not 0.
FASTFT_DEVICE void bulk_load(void* to, const void* from, int bytes, std::uint64_t* arrived) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(arrived))
               : "memory");
}
FASTFT_DEVICE void bulk_store(void* to, const void* from, int bytes) {  // a group of its own
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n\t"
      "cp.async.bulk.commit_group;" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
// Waits until all but the last N stores of this thread have read their shared memory; or until all are done.
template <int N>
FASTFT_DEVICE void bulk_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
FASTFT_DEVICE void bulk_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread wrote to shared memory can be seen by bulk copies that start after it.
FASTFT_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Writes x to `to` in the shared memory of block `rank` of the cluster; barrier b there counts its bytes. `to` and b
// are this block's addresses of what lies at the same place there.
FASTFT_DEVICE std::uint32_t address_of_rank(const void* p, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  return there;
}
FASTFT_DEVICE void send(int rank, float* to, float x, std::uint64_t* b) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address_of_rank(to, rank)),
      "f"(x), "r"(address_of_rank(b, rank))
      : "memory");
}
FASTFT_DEVICE void send(int rank, float* to, float x, float y, std::uint64_t* b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   address_of_rank(to, rank)),
               "f"(x), "f"(y), "r"(address_of_rank(b, rank))
               : "memory");
}

// ---- arithmetic: one instruction each, subnormal numbers are 0
FASTFT_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTFT_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTFT_DEVICE float max_nan(float a, float b) {  // NaN where one is NaN
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FASTFT_DEVICE unsigned max_bf16x2(unsigned a, unsigned b) {
  unsigned y;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
FASTFT_DEVICE unsigned pack_bf16x2(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Two floats at once: one instruction from sm_100 on, two before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
FASTFT_DEVICE unsigned long long pair_bits(float2 a) {
  unsigned long long r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "f"(a.x), "f"(a.y));
  return r;
}
FASTFT_DEVICE float2 pair_of(unsigned long long bits) {
  float2 r;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(r.x), "=f"(r.y) : "l"(bits));
  return r;
}
FASTFT_DEVICE float2 fma2(float2 a, float2 b, float2 c) {
  unsigned long long r;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(r) : "l"(pair_bits(a)), "l"(pair_bits(b)), "l"(pair_bits(c)));
  return pair_of(r);
}
FASTFT_DEVICE float2 add2(float2 a, float2 b) {
  unsigned long long r;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(pair_bits(a)), "l"(pair_bits(b)));
  return pair_of(r);
}
FASTFT_DEVICE float2 mul2(float2 a, float2 b) {
  unsigned long long r;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(r) : "l"(pair_bits(a)), "l"(pair_bits(b)));
  return pair_of(r);
}
#else
FASTFT_DEVICE float2 fma2(float2 a, float2 b, float2 c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
FASTFT_DEVICE float2 add2(float2 a, float2 b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }
FASTFT_DEVICE float2 mul2(float2 a, float2 b) { return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)}; }
#endif

}  // namespace fastft::cuda::bulk
