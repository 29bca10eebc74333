// Threads come from the OpenMP runtime that torch has already loaded (`import torch` makes it global): a pool of our
// own would fight torch's threads, which spin for milliseconds after each of torch's operators, for the same cores.
#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

#include "kernels.h"

namespace vittle::cpu {
namespace {

using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

OpenMPParallel openmp_parallel() {
  static const auto function = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return function;
}

struct Work {
  int64_t count, grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
      body(context, begin, begin + grain < count ? begin + grain : count);
    }
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t pieces = (count + grain - 1) / grain;
  if (pieces < threads) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    if (count > 0) body(context, 0, count);
    return;
  }
  Work work{count, grain, body, context};
  const auto run = [](void* shared) { static_cast<Work*>(shared)->run(); };
  if (const OpenMPParallel parallel = openmp_parallel()) {
    parallel(run, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, &work);
  work.run();
  for (std::thread& other : others) other.join();
}

}  // namespace vittle::cpu
