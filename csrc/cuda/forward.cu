#include "launch.cuh"

namespace vittle::cuda {
namespace {

// The sum over the warp, on its first lane, in one order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// One warp, one posterior row: what a row needs once is shared by many columns, and its KL needs no barrier.
template <typename H, typename P, bool kLearnedPrior, bool kAligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward f) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (i >= f.tokens) return;
  const int width = static_cast<int>(f.width);
  const int64_t token = checked_token(f, i);
  const PhiloxKeys keys = resident_keys(*f.seed);
  const Interpolation mix = interpolation(*f.alpha);
  const H* hidden = static_cast<const H*>(f.hidden.data) + row_offset(f.hidden, token);
  const P* mean = static_cast<const P*>(f.posterior.data) + row_offset(f.posterior, i);
  const P* logvar = mean + width;
  const float* prior_mean = kLearnedPrior ? f.prior + group_of(f, i) * 2 * width : nullptr;
  const float* prior_logvar = kLearnedPrior ? prior_mean + width : nullptr;
  H* out = static_cast<H*>(f.out) + token * width;

  float twice_kl = 0.0f;
  for (int column = threadIdx.x % kWarp * kVector; column < width; column += kWarp * kVector) {
    const auto h_stored = load<kAligned>(hidden, column, width);
    const auto mu_stored = load<kAligned>(mean, column, width);
    const auto s_stored = load<kAligned>(logvar, column, width);
    loads_before_arithmetic();
    float h[kVector], mu[kVector], s[kVector], m[kVector] = {}, v[kVector] = {}, eps[kVector], z[kVector];
    load_normals(keys, token, column, eps);
    unpack(h_stored, h);
    unpack(mu_stored, mu);
    unpack(s_stored, s);
    if constexpr (kLearnedPrior) {
      unpack(load<kAligned>(prior_mean, column, width), m);
      unpack(load<kAligned>(prior_logvar, column, width), v);
    }
    float turn = 0.0f;  // a sum of sums errs less
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const ForwardElement e =
          forward_element<P, kLearnedPrior>(h[j], mu[j], s[j], eps[j], mix, f.bound, m[j], v[j]);
      z[j] = e.out;
      if (kAligned || column + j < width) turn += e.twice_kl;
    }
    twice_kl += turn;
    store<kAligned>(out, column, width, z);
  }
  twice_kl = warp_sum(twice_kl);
  if (threadIdx.x % kWarp == 0) f.kl[token] = 0.5f * twice_kl / static_cast<float>(width);
}

}  // namespace

void forward(const Forward& f, Launch launch) {
  if (f.tokens == 0) return;
  check_width(f);
  const DeviceGuard guard(launch.device);
  const unsigned blocks = blocks_for(f.tokens, kWarps);
  const bool aligned = is_aligned(f) && is_aligned(f.hidden, f.hidden_type) && is_aligned(f.out);
  with_types(f, [&](auto h, auto q) {
    with_flag(f.prior != nullptr, [&](auto learned) {
      with_flag(aligned, [&](auto is_fast) {
        forward_kernel<decltype(h), decltype(q), learned, is_fast>
            <<<blocks, kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(f);
      });
    });
  });
  check(cudaGetLastError());
}

}  // namespace vittle::cuda
