// The host's conversions in csrc/dtype.h and the shim's beside the CUDA toolkit's own, which define what a GPU's are.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>

#include "dtype.h"
#include "include/half.h"

namespace {

using namespace vittle;

int differences = 0;

// Any NaN is as good as another.
void expect(uint32_t input, uint32_t toolkit, uint32_t found, uint32_t infinity) {
  const uint32_t sign = infinity == 0x7f800000u ? 0x80000000u : 0x8000u;
  const bool both_nan = (toolkit & ~sign) > infinity && (found & ~sign) > infinity;
  if (toolkit == found || both_nan) return;
  if (++differences <= 10) std::fprintf(stderr, "%08x: %x, the toolkit has %x\n", input, found, toolkit);
}

void narrow(uint32_t bits) {
  const float value = as_float(bits);
  BFloat16 bfloat;
  Float16 half;
  from_float(value, bfloat);
  from_float(value, half);
  const uint32_t toolkit_bfloat = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  const uint32_t toolkit_half = __half_as_ushort(__float2half_rn(value));
  expect(bits, toolkit_bfloat, bfloat.bits, 0x7f80u);
  expect(bits, toolkit_half, half.bits, 0x7c00u);
  expect(bits, toolkit_bfloat, shim::rounded<7, -126>(value), 0x7f80u);
  expect(bits, toolkit_half, shim::rounded<10, -14>(value), 0x7c00u);
}

void widen(uint16_t bits) {
  expect(bits, as_bits(__bfloat162float(__ushort_as_bfloat16(bits))), as_bits(to_float(BFloat16{bits})), 0x7f800000u);
  expect(bits, as_bits(__half2float(__ushort_as_half(bits))), as_bits(to_float(Float16{bits})), 0x7f800000u);
}

}  // namespace

int main() {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) widen(static_cast<uint16_t>(bits));
  for (uint32_t upper = 0; upper < 1u << 19; ++upper) {
    for (const uint32_t lower : {0x0u, 0x1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu}) narrow(upper << 13 | lower);  // ties
  }
  for (uint64_t bits = 0; bits < 1ull << 32; bits += 251) narrow(static_cast<uint32_t>(bits));
  return differences > 0;
}
