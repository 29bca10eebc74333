#include "launch.cuh"

namespace vittle::cuda {
namespace {

// The sum over the block, on thread 0, in an order that depends on nothing but the block's size.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sums[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  return sum;
}

// One block, one posterior row.
template <typename H, typename P, bool kLearnedPrior, bool kAligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward f) {
  const int64_t i = blockIdx.x;
  const int64_t token = checked_token(f, i);
  const PhiloxKey key = philox_key(*f.seed);
  const Interpolation mix = interpolation(*f.alpha);
  const H* hidden = static_cast<const H*>(f.hidden.data) + row_offset(f.hidden, token);
  const P* mean = static_cast<const P*>(f.posterior.data) + row_offset(f.posterior, i);
  const P* logvar = mean + f.width;
  const float* prior_mean = kLearnedPrior ? f.prior + group_of(f, i) * 2 * f.width : nullptr;
  const float* prior_logvar = kLearnedPrior ? prior_mean + f.width : nullptr;
  H* out = static_cast<H*>(f.out) + token * f.width;

  float kl = 0.0f;
  for (int64_t column = threadIdx.x * kVector; column < f.width; column += kTile) {
    float h[kVector], mu[kVector], s[kVector], m[kVector] = {}, v[kVector] = {}, eps[kVector], z[kVector];
    load<kAligned>(hidden, column, f.width, h);
    load<kAligned>(mean, column, f.width, mu);
    load<kAligned>(logvar, column, f.width, s);
    if constexpr (kLearnedPrior) {
      load<kAligned>(prior_mean, column, f.width, m);
      load<kAligned>(prior_logvar, column, f.width, v);
    }
    load_normals(key, token, column, eps);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const ForwardElement e = forward_element<kLearnedPrior>(h[j], mu[j], s[j], eps[j], mix, f.bound, m[j], v[j]);
      z[j] = e.out;
      if (kAligned || column + j < f.width) kl += e.kl;
    }
    store<kAligned>(out, column, f.width, z);
  }
  kl = block_sum(kl);
  if (threadIdx.x == 0) f.kl[token] = kl / static_cast<float>(f.width);
}

}  // namespace

void forward(const Forward& f, Launch launch) {
  if (f.tokens == 0) return;
  const DeviceGuard guard(launch.device);
  const bool aligned = is_aligned(f) && is_aligned(f.hidden, f.hidden_type) && is_aligned(f.out);
  with_types(f, [&](auto h, auto q) {
    with_flag(f.prior != nullptr, [&](auto learned) {
      with_flag(aligned, [&](auto is_fast) {
        forward_kernel<decltype(h), decltype(q), learned, is_fast>
            <<<static_cast<unsigned>(f.tokens), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(f);
      });
    });
  });
  check(cudaGetLastError());
}

}  // namespace vittle::cuda
