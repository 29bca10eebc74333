// As much of CUDA as csrc/cuda needs, on the host. A block is a team of threads with real barriers, so that sanitizers
// see what a GPU would run; blocks run one after another, so that one static copy is each block's shared memory.
// Kernel launches and inline PTX are no C++: conftest.py turns them into calls of shim::launch and shim::ptx.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "ptx.h"

#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};

struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};

inline thread_local uint3 threadIdx, blockIdx;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};

using cudaStream_t = struct CUstream_st*;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

struct cudaFuncAttributes {};

namespace shim {

constexpr int kDevices = 2;
constexpr unsigned kWarp = 32;

// The slots alternate: a lane that is one exchange ahead does not write where another still reads.
struct Warp {
  std::barrier<> lanes{kWarp};
  std::array<std::array<float, kWarp>, 2> slots{};
};

struct Block {
  explicit Block(unsigned threads) : all(threads), warps(threads / kWarp) {}

  std::barrier<> all;
  std::vector<Warp> warps;
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned exchanges = 0;
inline thread_local int device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

inline Warp& warp() { return block->warps[threadIdx.x / kWarp]; }

inline cudaError_t report(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

// Returns when the last block has; a thread that leaves the kernel is not waited for at the barriers of its block.
template <typename Kernel>
void launch(dim3 grid, unsigned threads, size_t, cudaStream_t, const Kernel& kernel) {
  const bool is_grid = grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y < 1u << 16 && grid.z == 1;
  if (!is_grid || threads % kWarp != 0 || threads > 1024) {
    report(cudaErrorInvalidConfiguration);
    return;
  }
  std::optional<Block> current;
  std::barrier next_block(threads, [&]() noexcept { current.emplace(threads); });
  const auto run = [&](unsigned thread) {
    threadIdx = {thread, 0, 0};
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        next_block.arrive_and_wait();
        blockIdx = {x, y, 0};
        block = &*current;
        exchanges = 0;
        kernel();
        warp().lanes.arrive_and_drop();
        block->all.arrive_and_drop();
      }
    }
  };
  std::vector<std::jthread> team;
  for (unsigned thread = 0; thread < threads; ++thread) team.emplace_back(run, thread);
}

}  // namespace shim

using std::min;

namespace shim {

inline void check_aligned(const uint4* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(uint4) != 0) fail("misaligned address");
}

}  // namespace shim

inline uint4 __ldg(const uint4* address) {
  shim::check_aligned(address);
  return *address;
}

inline void __stwb(uint4* address, uint4 value) {
  shim::check_aligned(address);
  *address = value;
}

// Lanes are threads of their own here and wait for one another at shuffles alone.
inline unsigned __activemask() { return ~0u; }
inline void __syncwarp(unsigned) {}

inline void __syncthreads() { shim::block->all.arrive_and_wait(); }

inline float __shfl_down_sync(unsigned, float value, unsigned delta) {
  const unsigned lane = threadIdx.x % shim::kWarp;
  auto& slots = shim::warp().slots[shim::exchanges++ % 2];
  slots[lane] = value;
  shim::warp().lanes.arrive_and_wait();
  return slots[lane + delta < shim::kWarp ? lane + delta : lane];
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::kDevices) return shim::report(cudaErrorInvalidDevice);
  shim::device = device;
  return cudaSuccess;
}

namespace shim {

// What a test sets in the environment: the newest CUDA that the driver knows (12040: 12.4), the GPU's architecture.
inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}
inline int driver() { return setting("SHIM_DRIVER", 13000); }
inline int architecture() { return setting("SHIM_ARCHITECTURE", 90); }

}  // namespace shim

inline cudaError_t cudaGetDeviceCount(int* count) {
  if (shim::driver() < 13000) return shim::report(cudaErrorInsufficientDriver);
  *count = shim::kDevices;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= shim::kDevices) return shim::report(cudaErrorInvalidDevice);
  *properties = {"host", shim::architecture() / 10, shim::architecture() % 10};
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return shim::architecture() < 80 ? shim::report(cudaErrorNoKernelImageForDevice) : cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = shim::driver();
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}
