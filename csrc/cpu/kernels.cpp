// Compiled once for each instruction set (see CMakeLists.txt), hence no std:: templates here: the linker keeps one
// copy of each, and it could be the one that an older processor cannot run.
#include "kernels.h"

#include "../element.h"
#include "../philox.h"
#include "lanes.h"

namespace vittle::cpu {
namespace {

// Columns handled at a time: their noise stays in the first-level cache. A multiple of four, as Philox gives four.
constexpr int64_t kTile = 512;

// Fetches what a tile will read while its noise is drawn, the columns of one step of Philox at a time: fetched all at
// once they would stall it. On an EPYC with AVX-512, a fifth of the time of forward in fp32.
template <typename T>
void prefetch(const T* columns) {
  for (uint32_t bytes = 0; bytes < 4 * kLanes * sizeof(T); bytes += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(columns) + bytes);
  }
}

template <typename H, typename P>
void tile_normals(const PhiloxKeys& keys, int64_t row, int64_t column, int64_t count, const H* hidden, const P* mean,
                  const P* logvar, float* __restrict eps) {
  const PhiloxWords<uint32_t> first = noise_counter(row, static_cast<uint32_t>(column / 4));
  const uint32_t quads = static_cast<uint32_t>((count + 3) / 4);
  PhiloxWords<Lanes> counter = {
      {count_from(first.word[0]), broadcast(first.word[1]), broadcast(first.word[2]), broadcast(0)}};
  alignas(64) uint32_t words[4][kTile / 4];
  for (uint32_t q = 0; q < quads; q += kLanes) {
    const PhiloxWords<Lanes> mixed = philox4x32(keys, counter);
    for (int i = 0; i < 4; ++i) store(mixed.word[i], words[i] + q);
    counter.word[0] = counter.word[0] + kLanes;
    if constexpr (kLanes > 1) {
      prefetch(hidden + column + 4 * q);
      prefetch(mean + column + 4 * q);
      prefetch(logvar + column + 4 * q);
    }
  }
  for (uint32_t q = 0; q < quads; ++q) {
    const Normals n = normals({{words[0][q], words[1][q], words[2][q], words[3][q]}});
    eps[4 * q] = n.eps[0];
    eps[4 * q + 1] = n.eps[1];
    eps[4 * q + 2] = n.eps[2];
    eps[4 * q + 3] = n.eps[3];
  }
}

template <typename T>
struct MeanLogvar {
  T* __restrict mean;
  T* __restrict logvar;
};

template <typename T>
MeanLogvar<T> halves(T* row, int64_t width) {
  return {row, row + width};
}

template <typename H, typename P, bool kLearnedPrior>
void forward_row(const Forward& f, int64_t i) {
  const int64_t token = token_of(f, i);
  const PhiloxKeys keys = philox_keys(*f.seed);
  const Interpolation mix = interpolation(*f.alpha);
  const float bound = f.bound;
  const H* __restrict hidden = static_cast<const H*>(f.hidden.data) + row_offset(f.hidden, token);
  const auto q = halves(static_cast<const P*>(f.posterior.data) + row_offset(f.posterior, i), f.width);
  const auto prior = halves(f.prior + (kLearnedPrior ? group_of(f, i) * 2 * f.width : 0), kLearnedPrior ? f.width : 0);
  H* __restrict out = static_cast<H*>(f.out) + token * f.width;

  alignas(64) float eps[kTile];
  double kl = 0.0;
  for (int64_t column = 0; column < f.width; column += kTile) {
    const int64_t count = f.width - column < kTile ? f.width - column : kTile;
    tile_normals(keys, token, column, count, hidden, q.mean, q.logvar, eps);
    float tile_kl = 0.0f;
#pragma omp simd reduction(+ : tile_kl)
    for (int64_t j = 0; j < count; ++j) {
      const int64_t c = column + j;
      const float prior_mean = kLearnedPrior ? prior.mean[c] : 0.0f;
      const float prior_logvar = kLearnedPrior ? prior.logvar[c] : 0.0f;
      const ForwardElement e = forward_element<P, kLearnedPrior>(to_float(hidden[c]), to_float(q.mean[c]),
                                                              to_float(q.logvar[c]), eps[j], mix, bound, prior_mean, prior_logvar);
      from_float(e.out, out[c]);
      tile_kl += e.twice_kl;
    }
    kl += tile_kl;
  }
  f.kl[token] = static_cast<float>(0.5 * kl / static_cast<double>(f.width));
}

template <typename H, typename P, bool kLearnedPrior, bool kGradHidden>
void backward_row(const Backward& b, int64_t i, int64_t group, float* partial) {
  const int64_t token = token_of(b, i);
  const PhiloxKeys keys = philox_keys(*b.seed);
  const Interpolation mix = interpolation(*b.alpha);
  const float bound = b.bound;
  const float k = b.grad_kl[token] / static_cast<float>(b.width);
  const H* __restrict grad_out = static_cast<const H*>(b.grad_out.data) + row_offset(b.grad_out, token);
  const auto q = halves(static_cast<const P*>(b.posterior.data) + row_offset(b.posterior, i), b.width);
  const auto prior = halves(b.prior + (kLearnedPrior ? group * 2 * b.width : 0), kLearnedPrior ? b.width : 0);
  const auto grad_q = halves(static_cast<P*>(b.grad_posterior) + i * 2 * b.width, b.width);
  const auto grad_prior = halves(partial, kLearnedPrior ? b.width : 0);
  H* __restrict grad_hidden = kGradHidden ? static_cast<H*>(b.grad_hidden) + token * b.width : nullptr;

  alignas(64) float eps[kTile];
  for (int64_t column = 0; column < b.width; column += kTile) {
    const int64_t count = b.width - column < kTile ? b.width - column : kTile;
    tile_normals(keys, token, column, count, grad_out, q.mean, q.logvar, eps);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const int64_t c = column + j;
      const float prior_mean = kLearnedPrior ? prior.mean[c] : 0.0f;
      const float prior_logvar = kLearnedPrior ? prior.logvar[c] : 0.0f;
      const BackwardElement e = backward_element<P, kLearnedPrior>(to_float(grad_out[c]), k, to_float(q.mean[c]),
                                                                to_float(q.logvar[c]), eps[j], mix, bound, prior_mean, prior_logvar);
      if constexpr (kGradHidden) from_float(e.hidden, grad_hidden[c]);
      from_float(e.mean, grad_q.mean[c]);
      from_float(e.logvar, grad_q.logvar[c]);
      if constexpr (kLearnedPrior) {
        grad_prior.mean[c] += e.prior_mean;
        grad_prior.logvar[c] += e.prior_logvar;
      }
    }
  }
}

template <typename F>
void parallel(int64_t count, int64_t grain, int threads, F&& body) {
  parallel_for(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))(i);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Rows a thread takes at a time: about 2^14 elements, so that taking them costs nothing and threads end together.
int64_t grain_of(const Problem& p) { return p.width >= (1 << 14) ? 1 : (1 << 14) / p.width; }

template <typename F>
void with_types(const Problem& p, F&& f) {
  with_type(p.hidden_type, [&](auto h) { with_type(p.posterior_type, [&](auto q) { f(h, q); }); });
}

void forward(const Forward& f, int threads) {
  with_types(f, [&](auto h, auto q) {
    using H = decltype(h);
    using P = decltype(q);
    parallel(f.tokens, grain_of(f), threads, [&](int64_t i) {
      f.prior ? forward_row<H, P, true>(f, i) : forward_row<H, P, false>(f, i);
    });
  });
}

template <typename H, typename P, bool kGradHidden>
void backward_prior_blocks(const Backward& b, int threads) {
  const int64_t columns = 2 * b.width;
  parallel(max_row_blocks(b), 1, threads, [&](int64_t block) {
    const RowBlock range = row_block(b, block);
    float* partial = b.partials + block * columns;
    for (int64_t c = 0; c < columns; ++c) partial[c] = 0.0f;
    for (int64_t i = range.begin; i < range.end; ++i) {
      backward_row<H, P, true, kGradHidden>(b, i, range.group, partial);
    }
  });
  parallel((columns + kTile - 1) / kTile, 1, threads, [&](int64_t tile) {
    const int64_t first = tile * kTile;
    const int64_t count = columns - first < kTile ? columns - first : kTile;
    for (int64_t group = 0; group < b.groups; ++group) {
      double sum[kTile] = {};
      const GroupRows rows = group_rows(b, group);
      for (int64_t block = rows.first_block; block < rows.end_block; ++block) {
        const float* partial = b.partials + block * columns + first;
        for (int64_t j = 0; j < count; ++j) sum[j] += partial[j];
      }
      float* grad = b.grad_prior + group * columns + first;
      for (int64_t j = 0; j < count; ++j) grad[j] = static_cast<float>(sum[j]);
    }
  });
}

template <typename H, typename P, bool kGradHidden>
void backward_rows(const Backward& b, int threads) {
  parallel(b.tokens, grain_of(b), threads, [&](int64_t i) {
    backward_row<H, P, false, kGradHidden>(b, i, 0, nullptr);
  });
}

void backward(const Backward& b, int threads) {
  with_types(b, [&](auto h, auto q) {
    using H = decltype(h);
    using P = decltype(q);
    if (b.prior) {
      b.grad_hidden ? backward_prior_blocks<H, P, true>(b, threads) : backward_prior_blocks<H, P, false>(b, threads);
    } else {
      b.grad_hidden ? backward_rows<H, P, true>(b, threads) : backward_rows<H, P, false>(b, threads);
    }
  });
}

void philox(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count) {
  const PhiloxKeys keys = philox_keys(seed);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* c = counters + 4 * i;
    const PhiloxWords<uint32_t> w = philox4x32(keys, PhiloxWords<uint32_t>{{c[0], c[1], c[2], c[3]}});
    for (int64_t j = 0; j < 4; ++j) words[4 * i + j] = w.word[j];
  }
}

void normals_of_words(const uint32_t* words, float* eps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) box_muller(words[2 * i], words[2 * i + 1], eps[2 * i], eps[2 * i + 1]);
}

void exponentials(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = exponential(x[i]);
}

}  // namespace

#define VITTLE_JOIN_(a, b) a##b
#define VITTLE_JOIN(a, b) VITTLE_JOIN_(a, b)
#define VITTLE_STRING_(x) #x
#define VITTLE_STRING(x) VITTLE_STRING_(x)

extern const Kernels VITTLE_JOIN(kernels_, VITTLE_INSTRUCTION_SET);
const Kernels VITTLE_JOIN(kernels_, VITTLE_INSTRUCTION_SET) = {
    VITTLE_STRING(VITTLE_INSTRUCTION_SET), forward, backward, philox, normals_of_words, exponentials};

}  // namespace vittle::cpu
