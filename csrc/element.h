// One element of the bottleneck: the posterior's sample, the interpolation, the KL, and their gradients.
// The only copy of the formulas in csrc; vittle_kernels/backends/eager.py states them in PyTorch.
//
//   z   = mu + exp(s / 2) eps             out = (1 - alpha) h + alpha z
//   KL  = 1/2 [v - s + (exp(s) + (mu - m)^2) exp(-v) - 1]
//
// with s the bounded log-variance of the posterior, m and v mean and log-variance of the prior (0 and 0 when fixed).
#pragma once

#include "approx.h"

namespace vittle {

struct Interpolation {
  float alpha, keep;  // keep = 1 - alpha
};

VITTLE_FN Interpolation interpolation(float alpha) { return {alpha, 1.0f - alpha}; }

// A posterior in half precision is itself rounded by more than exponential's correction is worth. P: its storage type.
template <typename P>
constexpr bool kCorrected = sizeof(P) == sizeof(float);

struct ForwardElement {
  float out, twice_kl;
};

template <typename P, bool kLearnedPrior>
VITTLE_FN ForwardElement forward_element(float h, float mean, float logvar, float eps, Interpolation mix, float bound,
                                         float prior_mean, float prior_logvar) {
  const float s = clamp(logvar, -bound, bound);
  const Spread q = spread<kCorrected<P>>(s);
  const float z = mean + q.sigma * eps;
  const float out = mix.keep * h + mix.alpha * z;
  if constexpr (kLearnedPrior) {
    const float shift = mean - prior_mean;
    const float precision = exponential<kCorrected<P>>(-prior_logvar);
    return {out, prior_logvar - s + (shift * shift + q.variance) * precision - 1.0f};
  } else {
    return {out, mean * mean + (q.variance_minus_1 - s)};
  }
}

struct BackwardElement {
  float hidden, mean, logvar;      // gradients of the inputs
  float prior_mean, prior_logvar;  // this row's share of the prior's gradient
};

// g = dL/dout, k = dL/dkl / D. The gradient passes straight through the bound on the log-variance.
template <typename P, bool kLearnedPrior>
VITTLE_FN BackwardElement backward_element(float g, float k, float mean, float logvar, float eps, Interpolation mix,
                                           float bound, float prior_mean, float prior_logvar) {
  const float s = clamp(logvar, -bound, bound);
  const Spread q = spread<kCorrected<P>>(s);
  const float dz = mix.alpha * g;
  const float dsample = (0.5f * mix.alpha) * g * (eps * q.sigma);
  if constexpr (kLearnedPrior) {
    const float precision = exponential<kCorrected<P>>(-prior_logvar);
    const float shift = (mean - prior_mean) * precision;
    const float ratio = q.variance * precision;
    return {mix.keep * g, dz + k * shift, dsample + 0.5f * k * (ratio - 1.0f), -k * shift,
            0.5f * k * (1.0f - ratio - shift * (mean - prior_mean))};
  } else {
    return {mix.keep * g, dz + k * mean, dsample + (0.5f * k) * q.variance_minus_1, 0.0f, 0.0f};
  }
}

}  // namespace vittle
