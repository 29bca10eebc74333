// Philox words of several counters at once: each in the low half of a 64-bit lane, with anything in the high half. The
// multiplication reads low halves only, so a round shuffles nothing, which a loop over 32-bit words has to.
#pragma once

#include "../approx.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vittle::cpu {
namespace {  // each instruction set's own

#if defined(__AVX2__)

#if defined(__AVX512F__)
constexpr uint32_t kLanes = 8;
#else
constexpr uint32_t kLanes = 4;
#endif

struct Lanes {
  using Vector = uint64_t __attribute__((vector_size(8 * kLanes)));
  Vector value;
};

VITTLE_FN Lanes operator^(Lanes a, Lanes b) { return {a.value ^ b.value}; }
VITTLE_FN Lanes operator^(Lanes a, uint32_t b) { return {a.value ^ b}; }
VITTLE_FN Lanes operator+(Lanes a, uint32_t b) { return {a.value + b}; }
VITTLE_FN Lanes high_word(Lanes product) { return {product.value >> 32}; }
VITTLE_FN Lanes low_word(Lanes product) { return product; }

VITTLE_FN Lanes wide_product(uint32_t factor, Lanes word) {
#if defined(__AVX512F__)  // maskz, because of _mm512_mul_epu32 GCC 12 warns in its own header
  return {(Lanes::Vector)_mm512_maskz_mul_epu32(0xff, _mm512_set1_epi64(factor), (__m512i)word.value)};
#else
  return {(Lanes::Vector)_mm256_mul_epu32(_mm256_set1_epi64x(factor), (__m256i)word.value)};
#endif
}

VITTLE_FN Lanes broadcast(uint32_t word) { return {Lanes::Vector{} + word}; }

// first, first + 1, ...
VITTLE_FN Lanes count_from(uint32_t first) {
  Lanes lanes = broadcast(first);
  for (uint32_t i = 0; i < kLanes; ++i) lanes.value[i] += i;
  return lanes;
}

VITTLE_FN void store(Lanes words, uint32_t* target) {
  using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
  const Words low = __builtin_convertvector(words.value, Words);
  memcpy(target, &low, sizeof low);
}

#else

// Elsewhere the compiler vectorizes a loop over single words.
using Lanes = uint32_t;
constexpr uint32_t kLanes = 1;

VITTLE_FN Lanes broadcast(uint32_t word) { return word; }
VITTLE_FN Lanes count_from(uint32_t first) { return first; }
VITTLE_FN void store(Lanes word, uint32_t* target) { *target = word; }

#endif

}  // namespace
}  // namespace vittle::cpu
