// What the launchers share: the device, the noise of eight columns, the choice of template, error messages.
#pragma once

#include <cuda_runtime.h>

#undef NDEBUG  // for the declaration of __assert_fail
#include <cassert>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "../element.h"
#include "../philox.h"
#include "kernels.h"
#include "vector.cuh"

namespace vittle::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Makes a device current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }

 private:
  int device_, previous_ = 0;
};

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int64_t kMaxGridY = 65535;

// As many blocks as cover `count` things, `per_block` at a time.
inline unsigned blocks_for(int64_t count, int64_t per_block, int64_t limit = kMaxInt) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks > limit) throw std::invalid_argument("more rows, columns or groups than a CUDA grid has blocks for");
  return static_cast<unsigned>(blocks);
}

// Columns are counted in int, a turn of a warp past the last one included.
inline void check_width(const Problem& p) {
  if (p.width > kMaxInt - kWarp * kVector) throw std::invalid_argument("rows are too wide for the CUDA kernels");
}

// Keeps a value in its register: left alone, the compiler computes it anew in every turn of a loop.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

template <typename T>
__device__ __forceinline__ void keep(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

__device__ __forceinline__ PhiloxKeys resident_keys(int64_t seed) {
  PhiloxKeys keys = philox_keys(seed);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keep(keys.low[round]);
    keep(keys.high[round]);
  }
  return keys;
}

// Keeps the loads above it together, all in flight at once: the compiler would rather wait for registers.
__device__ __forceinline__ void loads_before_arithmetic() { __syncwarp(__activemask()); }

// The noise of columns [column, column + 8) of a token's row; column is a multiple of 8.
__device__ __forceinline__ void load_normals(const PhiloxKeys& keys, int64_t token, int column, float (&eps)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const Normals n = vittle::normals(philox4x32(keys, noise_counter(token, static_cast<uint32_t>(column + i) / 4)));
#pragma unroll
    for (int j = 0; j < 4; ++j) eps[i + j] = n.eps[j];
  }
}

// A rows tensor comes from the user and is not read on the host, so a bad index is caught here.
__device__ __forceinline__ int64_t checked_token(const Problem& p, int64_t i) {
  const int64_t token = token_of(p, i);
  if (static_cast<uint64_t>(token) >= static_cast<uint64_t>(p.tokens)) {
    __assert_fail("rows[i] in [0, tokens)", "fused_ib", __LINE__, "rows");
  }
  return token;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline bool is_aligned(const Rows& rows, DType dtype) {
  const int64_t step = dtype == DType::float32 ? 4 : 8;
  return is_aligned(rows.data) && rows.inner_stride % step == 0 && rows.outer_stride % step == 0;
}

inline bool is_aligned(const Problem& p) {
  return p.width % kVector == 0 && is_aligned(p.posterior, p.posterior_type) && is_aligned(p.prior);
}

template <typename F>
void with_types(const Problem& p, F&& f) {
  with_type(p.hidden_type, [&](auto h) { with_type(p.posterior_type, [&](auto q) { f(h, q); }); });
}

template <typename F>
void with_flag(bool flag, F&& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace vittle::cuda
