// The noise and the elementary functions by themselves, and whether this machine can run the kernels.
#include "launch.cuh"

#include <string>

namespace vittle::cuda {
namespace {

template <typename F>
__global__ void for_each_kernel(int64_t count, F f) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) f(i);
}

template <typename F>
void for_each(int64_t count, Launch launch, F f) {
  if (count == 0) return;
  const DeviceGuard guard(launch.device);
  for_each_kernel<<<blocks_for(count, kThreads), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(count, f);
  check(cudaGetLastError());
}

struct Philox {
  PhiloxKeys keys;
  const uint32_t* counters;
  uint32_t* words;
  __device__ void operator()(int64_t i) const {
    const uint32_t* c = counters + 4 * i;
    const PhiloxWords<uint32_t> w = philox4x32(keys, PhiloxWords<uint32_t>{{c[0], c[1], c[2], c[3]}});
    for (int j = 0; j < 4; ++j) words[4 * i + j] = w.word[j];
  }
};

struct BoxMuller {
  const uint32_t* words;
  float* eps;
  __device__ void operator()(int64_t i) const { box_muller(words[2 * i], words[2 * i + 1], eps[2 * i], eps[2 * i + 1]); }
};

struct Exponential {
  const float* x;
  float* y;
  __device__ void operator()(int64_t i) const { y[i] = exponential(x[i]); }
};

}  // namespace

void philox(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count, Launch launch) {
  for_each(count, launch, Philox{philox_keys(seed), counters, words});
}

void normals(const uint32_t* words, float* eps, int64_t count, Launch launch) {
  for_each(count, launch, BoxMuller{words, eps});
}

void exponentials(const float* x, float* y, int64_t count, Launch launch) {
  for_each(count, launch, Exponential{x, y});
}

std::string why_unavailable(int device) {
  int devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess) {
    cudaGetLastError();  // clears it: asking is no error of the caller's
    int driver = 0;
    if (status != cudaErrorInsufficientDriver || cudaDriverGetVersion(&driver) != cudaSuccess) {
      return cudaGetErrorString(status);
    }
    if (driver == 0) return "no CUDA driver on this machine";
    return "the driver supports CUDA up to " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + " only";
  }
  if (devices == 0) return "no CUDA device";
  const int current = device < 0 ? 0 : device;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, current) != cudaSuccess) {
    cudaGetLastError();
    return "no CUDA device " + std::to_string(current);
  }
  const DeviceGuard guard(current);
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, for_each_kernel<Exponential>) != cudaSuccess) {
    cudaGetLastError();
    return std::string(properties.name) + " is sm_" + std::to_string(properties.major) +
           std::to_string(properties.minor);
  }
  return "";
}

}  // namespace vittle::cuda
