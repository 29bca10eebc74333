#include "launch.cuh"

namespace vittle::cuda {
namespace {

// With a fixed prior nothing is summed over rows: short runs of rows fill the machine at any batch size.
constexpr int64_t kRowsPerRun = 4;

// A thread owns eight columns of a run of posterior rows, so that the prior's gradient stays in its registers.
template <typename H, typename P, bool kLearnedPrior, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward b) {
  const int64_t column = blockIdx.y * static_cast<int64_t>(kTile) + threadIdx.x * kVector;
  if (column >= b.width) return;
  const int64_t block = blockIdx.x;
  const int64_t first = block * kRowsPerRun;
  const RowBlock run = kLearnedPrior ? row_block(b, block)
                                     : RowBlock{0, first, min(first + kRowsPerRun, b.tokens)};
  const PhiloxKey key = philox_key(*b.seed);
  const Interpolation mix = interpolation(*b.alpha);

  float m[kVector] = {}, v[kVector] = {}, dm[kVector] = {}, dv[kVector] = {};
  if constexpr (kLearnedPrior) {
    const float* prior = b.prior + run.group * 2 * b.width;
    load<kAligned>(prior, column, b.width, m);
    load<kAligned>(prior + b.width, column, b.width, v);
  }
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t token = checked_token(b, i);
    const float k = b.grad_kl[token] / static_cast<float>(b.width);
    const P* mean = static_cast<const P*>(b.posterior.data) + row_offset(b.posterior, i);
    float g[kVector], mu[kVector], s[kVector], eps[kVector], dh[kVector], dmu[kVector], ds[kVector];
    load<kAligned>(static_cast<const H*>(b.grad_out.data) + row_offset(b.grad_out, token), column, b.width, g);
    load<kAligned>(mean, column, b.width, mu);
    load<kAligned>(mean + b.width, column, b.width, s);
    load_normals(key, token, column, eps);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const BackwardElement e = backward_element<kLearnedPrior>(g[j], k, mu[j], s[j], eps[j], mix, b.bound, m[j], v[j]);
      dh[j] = e.hidden;
      dmu[j] = e.mean;
      ds[j] = e.logvar;
      dm[j] += e.prior_mean;
      dv[j] += e.prior_logvar;
    }
    P* grad_mean = static_cast<P*>(b.grad_posterior) + i * 2 * b.width;
    store<kAligned>(grad_mean, column, b.width, dmu);
    store<kAligned>(grad_mean + b.width, column, b.width, ds);
    if (b.grad_hidden) store<kAligned>(static_cast<H*>(b.grad_hidden) + token * b.width, column, b.width, dh);
  }
  if constexpr (kLearnedPrior) {
    float* partial = b.partials + block * 2 * b.width;
    store<kAligned>(partial, column, b.width, dm);
    store<kAligned>(partial + b.width, column, b.width, dv);
  }
}

// One thread, one entry of the prior: the group's blocks in their order.
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(const Backward b) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t group = blockIdx.y;
  if (column >= 2 * b.width) return;
  const GroupRows rows = group_rows(b, group);
  double sum = 0.0;
#pragma unroll 8
  for (int64_t block = rows.first_block; block < rows.end_block; ++block) {
    sum += b.partials[block * 2 * b.width + column];
  }
  b.grad_prior[group * 2 * b.width + column] = static_cast<float>(sum);
}

}  // namespace

void backward(const Backward& b, Launch launch) {
  const DeviceGuard guard(launch.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const bool aligned = is_aligned(b) && is_aligned(b.grad_out, b.hidden_type) && is_aligned(b.grad_hidden) &&
                       is_aligned(b.grad_posterior) && is_aligned(b.partials);
  const int64_t runs = b.prior ? max_row_blocks(b) : (b.tokens + kRowsPerRun - 1) / kRowsPerRun;
  const dim3 grid(static_cast<unsigned>(runs), static_cast<unsigned>((b.width + kTile - 1) / kTile));
  if (runs > 0) {
    with_types(b, [&](auto h, auto q) {
      with_flag(b.prior != nullptr, [&](auto learned) {
        with_flag(aligned, [&](auto is_fast) {
          backward_kernel<decltype(h), decltype(q), learned, is_fast><<<grid, kThreads, 0, stream>>>(b);
        });
      });
    });
    check(cudaGetLastError());
  }
  if (b.prior) {
    const dim3 columns(static_cast<unsigned>((2 * b.width + kThreads - 1) / kThreads), static_cast<unsigned>(b.groups));
    sum_partials_kernel<<<columns, kThreads, 0, stream>>>(b);
    check(cudaGetLastError());
  }
}

}  // namespace vittle::cuda
