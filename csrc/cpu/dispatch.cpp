// Chooses the kernels for this machine's instruction set, once, at run time.
#include <cstring>

#include "kernels.h"

namespace vittle::cpu {

#if defined(VITTLE_X86)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_baseline;

namespace {

#if defined(VITTLE_X86)
bool supports(const Kernels& kernels) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (&kernels == &kernels_avx2) return avx2;
  if (&kernels == &kernels_avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return true;
}
const Kernels* const candidates[] = {&kernels_avx512, &kernels_avx2, &kernels_baseline};
#else
bool supports(const Kernels&) { return true; }
const Kernels* const candidates[] = {&kernels_baseline};
#endif

const Kernels* best() {
  for (const Kernels* candidate : candidates) {
    if (supports(*candidate)) return candidate;
  }
  return &kernels_baseline;
}

const Kernels*& chosen() {
  static const Kernels* kernels = best();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

bool select_instruction_set(const char* name) {
  for (const Kernels* candidate : candidates) {
    if (std::strcmp(candidate->instruction_set, name) == 0 && supports(*candidate)) {
      chosen() = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace vittle::cpu
