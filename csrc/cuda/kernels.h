// The CUDA kernels. Every function launches on the given device and stream and returns without waiting.
#pragma once

#include <string>

#include "../fused_ib.h"

namespace vittle::cuda {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

// Each throws std::runtime_error with CUDA's own message when the launch is refused.
void forward(const Forward&, Launch);
void backward(const Backward&, Launch);

// The pieces by themselves, so that tests can hold them to the noise contract and their error bounds.
void philox(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count, Launch);  // (count, 4) each
void normals(const uint32_t* words, float* eps, int64_t count, Launch);                       // (count, 2) each
void exponentials(const float* x, float* y, int64_t count, Launch);

// Empty where a kernel can run on the device (-1: on some device of this machine), else why not.
std::string why_unavailable(int device);

}  // namespace vittle::cuda
