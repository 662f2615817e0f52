// What the kernels share: checked calls, the current device, packs of elements, element conversion.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastft/dtype.h"

namespace fastft::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// An array shared by a block. A macro, because csrc/tests/emulate gives each of its emulated blocks a copy.
#ifndef FASTFT_SHARED
#define FASTFT_SHARED(type, name, count) __shared__ type name[count]
#endif

// Every launch goes through here: the emulation cannot read <<<>>>, and a cluster needs this form anyway. cluster:
// blocks in one.
template <class... P, class... A>
void launch(void (*kernel)(P...), int blocks, int threads, int cluster, cudaStream_t stream, const char* what,
            const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), what);
}

// Makes a device current, and the previous one again at the end: torch tracks the current device too.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// N neighbouring elements, moved by one access of N * sizeof(T) bytes
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T>
__device__ inline T from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};  // to nearest, ties to even; NaN stays NaN
}

template <int N, class T>
__device__ inline void load_raw(const T* p, T (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = pack.at[j];
}

template <int N, class T>
__device__ inline void store_raw(T* p, const T (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.at[j] = x[j];
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <int N, class T>
__device__ inline void load(const T* p, float (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = to_float(pack.at[j]);
}

template <int N, class T>
__device__ inline void store(T* p, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.at[j] = from_float<T>(x[j]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

}  // namespace fastft::cuda
