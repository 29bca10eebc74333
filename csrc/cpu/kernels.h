// The CPU kernels, compiled once for each instruction set; dispatch.cpp chooses among them at run time.
#pragma once

#include "../fused_ib.h"

namespace vittle::cpu {

struct Kernels {
  const char* instruction_set;
  void (*forward)(const Forward&, int threads);
  void (*backward)(const Backward&, int threads);
  // The pieces by themselves, so that tests can hold them to the noise contract and their error bounds.
  void (*philox)(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count);  // (count, 4) each
  void (*normals)(const uint32_t* words, float* eps, int64_t count);                       // (count, 2) each
  void (*exponentials)(const float* x, float* y, int64_t count);
};

// The best that this machine supports, or the one that select_instruction_set chose.
const Kernels& kernels();

// False where the library has no such kernels or this machine cannot run them.
bool select_instruction_set(const char* name);

// Asks for huge pages beneath the whole 2 MiB blocks of memory that is about to be written.
void prefer_huge_pages(void* data, int64_t bytes);

// Runs body(context, begin, end) over [0, count) in pieces of at most grain, on up to `threads` threads.
void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace vittle::cpu
