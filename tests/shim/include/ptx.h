// The PTX instructions of csrc, rounded correctly where a GPU approximates.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace shim {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

}  // namespace shim

namespace shim::ptx {

inline float flushed(double x) { return std::fpclassify(static_cast<float>(x)) == FP_SUBNORMAL ? 0.0f : x; }

inline float max_NaN_f32(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline float min_NaN_f32(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float ex2_approx_ftz_f32(float x) { return flushed(std::exp2(static_cast<double>(x))); }
inline float lg2_approx_ftz_f32(float x) { return flushed(std::log2(static_cast<double>(x))); }
inline float sqrt_approx_ftz_f32(float x) { return flushed(std::sqrt(static_cast<double>(x))); }

// A GPU keeps its error bound on [-pi, pi] only.
inline double angle(float x) {
  if (std::fabs(x) > 3.1415928f) fail("sin.approx or cos.approx outside [-pi, pi]");
  return x;
}

inline float sin_approx_ftz_f32(float x) { return flushed(std::sin(angle(x))); }
inline float cos_approx_ftz_f32(float x) { return flushed(std::cos(angle(x))); }

}  // namespace shim::ptx
