#include "launch.cuh"

namespace vittle::cuda {
namespace {

constexpr int kTile = kThreads * kVector;  // columns that a block of backward_prior_kernel handles

// Where one posterior row's gradients come from and go to.
template <typename H, typename P>
struct BackwardRow {
  int64_t token;
  float k;
  const H* grad_out;
  const P* mean;
  H* grad_hidden;
  P* grad_mean;
};

template <typename H, typename P>
__device__ __forceinline__ BackwardRow<H, P> backward_row(const Backward& b, int64_t i, float per_column) {
  const int64_t token = checked_token(b, i);
  return {token,
          b.grad_kl[token] * per_column,
          static_cast<const H*>(b.grad_out.data) + row_offset(b.grad_out, token),
          static_cast<const P*>(b.posterior.data) + row_offset(b.posterior, i),
          b.grad_hidden ? static_cast<H*>(b.grad_hidden) + token * b.width : nullptr,
          static_cast<P*>(b.grad_posterior) + i * 2 * b.width};
}

// Eight columns of the prior and of its gradient, which sums rows.
struct PriorColumns {
  float mean[kVector], logvar[kVector], grad_mean[kVector], grad_logvar[kVector];
};

template <bool kLearnedPrior, bool kAligned, typename H, typename P>
__device__ __forceinline__ void backward_columns(const BackwardRow<H, P>& row, int column, int width,
                                                 const PhiloxKeys& keys, Interpolation mix, float bound,
                                                 PriorColumns& prior) {
  const auto g_stored = load<kAligned>(row.grad_out, column, width);
  const auto mu_stored = load<kAligned>(row.mean, column, width);
  const auto s_stored = load<kAligned>(row.mean + width, column, width);
  loads_before_arithmetic();
  float g[kVector], mu[kVector], s[kVector], eps[kVector], dh[kVector], dmu[kVector], ds[kVector];
  load_normals(keys, row.token, column, eps);
  unpack(g_stored, g);
  unpack(mu_stored, mu);
  unpack(s_stored, s);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const BackwardElement e = backward_element<P, kLearnedPrior>(g[j], row.k, mu[j], s[j], eps[j], mix, bound,
                                                                 prior.mean[j], prior.logvar[j]);
    dh[j] = e.hidden;
    dmu[j] = e.mean;
    ds[j] = e.logvar;
    prior.grad_mean[j] += e.prior_mean;
    prior.grad_logvar[j] += e.prior_logvar;
  }
  store<kAligned>(row.grad_mean, column, width, dmu);
  store<kAligned>(row.grad_mean + width, column, width, ds);
  if (row.grad_hidden) store<kAligned>(row.grad_hidden, column, width, dh);
}

// One warp, one posterior row, as in forward.
template <typename H, typename P, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward b) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  if (i >= b.tokens) return;
  const int width = static_cast<int>(b.width);
  BackwardRow<H, P> row = backward_row<H, P>(b, i, 1.0f / static_cast<float>(width));
  keep(row.grad_mean);
  keep(row.grad_hidden);
  const PhiloxKeys keys = resident_keys(*b.seed);
  const Interpolation mix = interpolation(*b.alpha);
  PriorColumns fixed = {};
  for (int column = threadIdx.x % kWarp * kVector; column < width; column += kWarp * kVector) {
    backward_columns<false, kAligned>(row, column, width, keys, mix, b.bound, fixed);
  }
}

// A thread owns eight columns of a block of posterior rows, so that the prior's gradient stays in its registers.
template <typename H, typename P, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_prior_kernel(const Backward b) {
  const int width = static_cast<int>(b.width);
  const int column = blockIdx.y * kTile + threadIdx.x * kVector;
  if (column >= width) return;
  const RowBlock block = row_block(b, blockIdx.x);
  const PhiloxKeys keys = resident_keys(*b.seed);
  const Interpolation mix = interpolation(*b.alpha);
  const float per_column = 1.0f / static_cast<float>(width);
  const float* mean = b.prior + block.group * 2 * b.width;
  PriorColumns prior = {};
  unpack(load<kAligned>(mean, column, width), prior.mean);
  unpack(load<kAligned>(mean + width, column, width), prior.logvar);
  for (int64_t i = block.begin; i < block.end; ++i) {
    backward_columns<true, kAligned>(backward_row<H, P>(b, i, per_column), column, width, keys, mix, b.bound, prior);
  }
  float* partial = b.partials + static_cast<int64_t>(blockIdx.x) * 2 * b.width;
  store<kAligned>(partial, column, width, prior.grad_mean);
  store<kAligned>(partial + width, column, width, prior.grad_logvar);
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
  check_width(b);
  const DeviceGuard guard(launch.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const bool aligned = is_aligned(b) && is_aligned(b.grad_out, b.hidden_type) && is_aligned(b.grad_hidden) &&
                       is_aligned(b.grad_posterior) && is_aligned(b.partials);
  const dim3 row_blocks(blocks_for(max_row_blocks(b), 1), blocks_for(b.width, kTile, kMaxGridY));
  const dim3 rows(blocks_for(b.tokens, kWarps));
  with_types(b, [&](auto h, auto q) {
    with_flag(aligned, [&](auto is_fast) {
      if (b.prior) {
        backward_prior_kernel<decltype(h), decltype(q), is_fast><<<row_blocks, kThreads, 0, stream>>>(b);
      } else if (b.tokens > 0) {
        backward_kernel<decltype(h), decltype(q), is_fast><<<rows, kThreads, 0, stream>>>(b);
      }
    });
  });
  check(cudaGetLastError());
  if (b.prior) {
    const dim3 columns(blocks_for(2 * b.width, kThreads), blocks_for(b.groups, 1, kMaxGridY));
    sum_partials_kernel<<<columns, kThreads, 0, stream>>>(b);
    check(cudaGetLastError());
  }
}

}  // namespace vittle::cuda
