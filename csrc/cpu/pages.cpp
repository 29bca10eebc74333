// Fresh memory costs a page fault for each 4 KiB, more than the kernels' own time on a result of tens of MiB; with
// huge pages, one for each 2 MiB.
#include <sys/mman.h>

#include "kernels.h"

namespace vittle::cpu {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // A hint: where the kernel has none to give, it fails, and nothing is lost.
  if (data && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace vittle::cpu
