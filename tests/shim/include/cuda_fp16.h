#pragma once

#include "half.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __float2half_rn(float value) { return {shim::rounded<10, -14>(value)}; }

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const int significand = exponent > 0 ? 1024 + fraction : fraction;
  const float finite = std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - 25);
  const float magnitude = exponent < 31 ? finite : fraction > 0 ? NAN : INFINITY;
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
