// Half precision by arithmetic rather than by bits: another way than csrc/dtype.h's to the same values.
#pragma once

#include <algorithm>
#include <cmath>

namespace shim {

// The nearest number with kFraction bits after the leading one, which spread evenly below 2^kLeast; ties to even.
template <int kFraction, int kLeast>
unsigned short rounded(float value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = 0x8000 - (1 << kFraction);
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return static_cast<unsigned short>(sign | infinity);
  const int exponent = std::max(std::ilogb(value), kLeast);
  const int steps = static_cast<int>(std::lrint(std::ldexp(std::fabs(value), kFraction - exponent)));
  return static_cast<unsigned short>(sign | std::min((exponent - kLeast) * (1 << kFraction) + steps, infinity));
}

}  // namespace shim
