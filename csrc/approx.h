// Elementary functions in fp32: polynomials that a host compiler vectorizes, single instructions on a GPU.
// Every error bound below is checked over its whole range by tests/kernels/test_approx.py.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VITTLE_FN __host__ __device__ __forceinline__
#else
#define VITTLE_FN static inline __attribute__((always_inline))
#endif

namespace vittle {

VITTLE_FN float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VITTLE_FN uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// min(max(x, low), high); NaN passes through, which fminf and fmaxf would swallow.
VITTLE_FN float clamp(float x, float low, float high) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(high));
  return y;
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

#if !defined(__CUDA_ARCH__)
// e^x = (1 + fraction) 2^exponent for x in about [-104, 89]. Both results below keep their precision by rounding
// 1 + fraction once.
struct SplitExponential {
  float fraction;
  int32_t exponent;
};

VITTLE_FN SplitExponential split_exponential(float x) {
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const float shifted = x * 1.44269504f + round_to_int;
  const float n = shifted - round_to_int;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.38146128e-3f;
  p = p * r + 8.36871006e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.99999940e-1f;
  return {p * (r * r) + r, static_cast<int32_t>(as_bits(shifted) - as_bits(round_to_int))};
}

VITTLE_FN float power_of_two(int32_t n) { return as_float(static_cast<uint32_t>(n + 127) << 23); }
#endif

#if defined(__CUDA_ARCH__)
VITTLE_FN float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// e^x. Host: relative error at most 2 ulp, overflow to infinity and gradual underflow as expf has them.
// GPU: ex2.approx of the rounded product, within |x| ulp; kCorrected, by what rounding lost, within 3. What would
// underflow is 0.
template <bool kCorrected = true>
VITTLE_FN float exponential(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kCorrected) x = clamp(x, -104.0f, 89.0f);
  const float power = x * 1.44269504f;
  if constexpr (!kCorrected) return power_of_two(power);
  const float lost = fmaf(x, 1.92596303e-8f, fmaf(x, 1.44269504f, -power));  // of x log2(e), to rounding
  return power_of_two(power) * fmaf(lost, 0.693147181f, 1.0f);
#else
  const SplitExponential e = split_exponential(clamp(x, -104.0f, 89.0f));
  const int32_t half = e.exponent >> 1;  // two factors, because 2^n alone leaves fp32 before e^x does
  return (1.0f + e.fraction) * power_of_two(half) * power_of_two(e.exponent - half);
#endif
}

// A Gaussian's standard deviation e^(s/2), variance e^s, and e^s - 1. Host: relative errors at most 2 ulp of the first
// two. GPU: as exponential.
struct Spread {
  float sigma, variance, variance_minus_1;
};

template <bool kCorrected>
VITTLE_FN Spread spread(float s) {
#if defined(__CUDA_ARCH__)
  const float sigma = kCorrected ? exponential(0.5f * s) : power_of_two(0.721347520f * s);
  return {sigma, sigma * sigma, fmaf(sigma, sigma, -1.0f)};
#else
  const SplitExponential e = split_exponential(clamp(0.5f * s, -87.0f, 89.0f));
  const float scale = power_of_two(e.exponent);
  const float squared = e.fraction * e.fraction + 2.0f * e.fraction;  // (1 + fraction)^2 - 1
  const float variance = (1.0f + squared) * scale * scale;
  return {(1.0f + e.fraction) * scale, variance, variance - 1.0f};
#endif
}

VITTLE_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_sqrtf(x);
#endif
}

// log2(x) for normal x in (0, 1]; never above 0. Host: error at most 2 ulp of the result.
VITTLE_FN float log2_of_fraction(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return -fabsf(y);
#else
  const uint32_t sqrt_half = 0x3f3504f3u;
  const int32_t e = static_cast<int32_t>(as_bits(x) - sqrt_half) >> 23;
  const float f = as_float(as_bits(x) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = 1.25836894e-1f;
  p = p * f - 2.07269683e-1f;
  p = p * f + 2.15715617e-1f;
  p = p * f - 2.38944829e-1f;
  p = p * f + 2.87916243e-1f;
  p = p * f - 3.60703677e-1f;
  p = p * f + 4.80910629e-1f;
  p = p * f - 7.21347332e-1f;
  p = p * f + 1.44269502f;
  return p * f + static_cast<float>(e);
#endif
}

struct SinCos {
  float sin, cos;
};

// Sine and cosine of the angle 2 pi (turn + 1/2) 2^-32. Host: absolute error at most 1.5e-7.
// GPU: sin.approx and cos.approx are accurate on [-pi, pi] only, hence the turn is read as signed.
VITTLE_FN SinCos sincos_of_turn(uint32_t turn) {
#if defined(__CUDA_ARCH__)
  const float angle = fmaf(static_cast<float>(static_cast<int32_t>(turn)), 1.46291808e-9f, 7.31459040e-10f);
  SinCos y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y.sin) : "f"(angle));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y.cos) : "f"(angle));
  return y;
#else
  const uint32_t quadrant = (turn + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(turn - (quadrant << 30));
  const float t = static_cast<float>(rest) * 2.32830644e-10f + 1.16415322e-10f;  // in [-1/8, 1/8] turns
  const float t2 = t * t;
  float s = -7.52400665e1f;
  s = s * t2 + 8.15881271e1f;
  s = s * t2 - 4.13416290e1f;
  s = s * t2 + 6.28318501f;
  s = s * t;
  float c = 5.92204323e1f;
  c = c * t2 - 8.54428558e1f;
  c = c * t2 + 6.49393158e1f;
  c = c * t2 - 1.97392082e1f;
  c = c * t2 + 1.0f;
  const bool swapped = quadrant & 1u;
  const float sine = swapped ? c : s;
  const float cosine = swapped ? s : c;
  return {as_float(as_bits(sine) ^ ((quadrant & 2u) << 30)),
          as_float(as_bits(cosine) ^ (((quadrant + 1u) & 2u) << 30))};
#endif
}

}  // namespace vittle
