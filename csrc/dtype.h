// Storage types and their conversion to and from fp32 (round to nearest even, NaN stays NaN).
#pragma once

#include "approx.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace vittle {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

VITTLE_FN int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

VITTLE_FN float to_float(float value) { return value; }

VITTLE_FN float to_float(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

VITTLE_FN float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t scaled = as_bits(as_float(magnitude) * 5.19229686e33f);  // 2^112 rebiases the exponent
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;   // infinity or NaN
  return as_float(scaled | special | sign);
#endif
}

VITTLE_FN void from_float(float value, float& stored) { stored = value; }

VITTLE_FN void from_float(float value, BFloat16& stored) {
#if defined(__CUDA_ARCH__)
  stored.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  stored.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
#endif
}

VITTLE_FN void from_float(float value, Float16& stored) {
#if defined(__CUDA_ARCH__)
  stored.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  stored.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
#endif
}

// Calls f with a value of the storage type that dtype names.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float16: return f(Float16{});
  }
}

}  // namespace vittle
