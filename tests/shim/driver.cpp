// The CUDA kernels beside the CPU's on the same problems, for the sanitizers: every tensor is an allocation of its own,
// of exactly the elements that a kernel may touch. Arguments: "float32" leaves half precision out; "rows" names a token
// that does not exist.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace vittle {
namespace {

std::mt19937 generator;

struct Case {
  int64_t tokens, width;
  std::vector<int32_t> offsets = {};  // none: the fixed prior
  int64_t start = 0, gap = 0;         // elements before the first row and between rows
};

template <typename T>
std::vector<T> missing(int64_t count) {
  T nan;
  from_float(NAN, nan);
  return std::vector<T>(count, nan);
}

template <typename T>
std::vector<T> normals(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) from_float(normal(generator), value);
  return values;
}

// Rows in threes, so that the strides have two levels.
template <typename T>
struct NormalRows {
  Rows rows;
  std::vector<T> storage;

  NormalRows(const Case& c, int64_t columns) : rows{nullptr, 3, 3 * (columns + c.gap) + c.gap, columns + c.gap} {
    if (c.tokens > 0) storage = normals<T>(c.start + row_offset(rows, c.tokens - 1) + columns);
    rows.data = storage.data() + c.start;
  }
};

// As near as two computations in fp32 are that differ in their elementary functions; never where one left a NaN.
template <typename T>
bool near(const std::vector<T>& a, const std::vector<T>& b) {
  const float tolerance = sizeof(T) == sizeof(float) ? 1e-4f : 1e-2f;
  return std::equal(a.begin(), a.end(), b.begin(), [=](T x, T y) {
    return std::fabs(to_float(x) - to_float(y)) <= tolerance * (1.0f + std::fabs(to_float(y)));
  });
}

// What one implementation makes of a problem.
template <typename H, typename P>
struct Results {
  std::vector<H> out, grad_hidden;
  std::vector<P> grad_posterior;
  std::vector<float> kl, partials, grad_prior;

  template <typename ForwardCall, typename BackwardCall>
  Results(Forward f, Backward b, ForwardCall forward, BackwardCall backward)
      : out(missing<H>(f.tokens * f.width)),
        grad_hidden(out),
        grad_posterior(missing<P>(f.tokens * 2 * f.width)),
        kl(missing<float>(f.tokens)),
        partials(missing<float>(f.prior ? max_row_blocks(f) * 2 * f.width : 0)),
        grad_prior(missing<float>(f.prior ? f.groups * 2 * f.width : 0)) {
    f.out = out.data();
    f.kl = kl.data();
    forward(f);
    b.grad_hidden = grad_hidden.data();
    b.grad_posterior = grad_posterior.data();
    b.partials = partials.data();
    b.grad_prior = grad_prior.data();
    backward(b);
  }

  bool are_near(const Results& other) const {
    return near(out, other.out) && near(kl, other.kl) && near(grad_hidden, other.grad_hidden) &&
           near(grad_posterior, other.grad_posterior) && near(grad_prior, other.grad_prior);
  }
};

template <typename H, typename P>
bool agree(const Case& c, DType hidden_type, DType posterior_type, bool has_bad_row) {
  const float alpha = 0.3f;
  const int64_t seed = -5, groups = std::max<int64_t>(1, c.offsets.size());
  std::vector<int64_t> rows(c.tokens);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), generator);
  if (has_bad_row) rows.back() = c.tokens;

  const auto prior = normals<float>(c.offsets.size() * 2 * c.width);
  const auto grad_kl = normals<float>(c.tokens);
  const NormalRows<P> posterior(c, 2 * c.width);
  const NormalRows<H> hidden(c, c.width), grad_out(c, c.width);
  const Problem problem = {c.tokens, c.width, 2.3f, &alpha, &seed, rows.data(), prior.empty() ? nullptr : prior.data(),
                           c.offsets.data(), groups, hidden_type, posterior_type, posterior.rows};
  const Forward f = {problem, hidden.rows, nullptr, nullptr};
  const Backward b = {problem, grad_out.rows, grad_kl.data(), nullptr, nullptr, nullptr, nullptr};

  const cuda::Launch launch = {0, nullptr};
  const cpu::Kernels& host = cpu::kernels();
  const Results<H, P> found(
      f, b, [=](const Forward& call) { cuda::forward(call, launch); },
      [=](const Backward& call) { cuda::backward(call, launch); });
  const Results<H, P> expected(
      f, b, [&](const Forward& call) { host.forward(call, 1); }, [&](const Backward& call) { host.backward(call, 1); });
  return found.are_near(expected);
}

const std::vector<Case> cases = {
    {7, 40},
    {7, 37, {7}},
    {4, 16, {1, 1, 4}, 8, 8},
    {4, 16, {0, 4}, 1, 8},
    {5, 24, {}, 0, 3},
    {40, 8, {0, 33, 33, 40}},
    {33, 5, {-1000, 2000000000, 3, -7}},
    {0, 16, {0, 0}},
    {1, 1},
    {2, 1032, {1, 2}},
    {1, 4096, {1}},
};

// Names each case that disagrees.
bool all_agree(const std::vector<DType>& types, bool has_bad_row) {
  bool all = true;
  for (const Case& c : cases) {
    for (const DType hidden : types) {
      for (const DType posterior : types) {
        with_type(hidden, [&](auto h) {
          with_type(posterior, [&](auto p) {
            if (agree<decltype(h), decltype(p)>(c, hidden, posterior, has_bad_row)) return;
            std::fprintf(stderr, "%td rows of %td, types %d and %d\n", c.tokens, c.width, static_cast<int>(hidden),
                         static_cast<int>(posterior));
            all = false;
          });
        });
      }
    }
  }
  return all;
}

}  // namespace
}  // namespace vittle

int main(int count, char** arguments) {
  using enum vittle::DType;
  const std::string_view mode = count > 1 ? arguments[1] : "";
  if (mode == "float32") return !vittle::all_agree({float32}, false);
  return !vittle::all_agree({float32, bfloat16, float16}, mode == "rows");
}
