"""The error bounds that csrc/approx.h states, over their whole range."""

from __future__ import annotations

import pytest
import torch
from support import Case, fused_ib_variance

from vittle_kernels.backends import native


def exponentials(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    native.library().exponentials(native.target(x.device), x.data_ptr(), y.data_ptr(), x.numel())
    return y


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((found.double() - truth) / truth).abs().max())


def test_exponential(case: Case) -> None:
    if case.backend not in ("cpu", "cuda"):
        pytest.skip("its exponential is PyTorch's or Triton's")
    x = torch.linspace(-87.3, 88.7, 1 << 22, device=case.device)
    bound = (2 if case.backend == "cpu" else 3) * 2.0**-23
    assert relative_error(exponentials(x), x.double().exp()) <= bound
    edges = torch.tensor([-200, -torch.inf, 89, torch.inf, torch.nan, 0], device=case.device)
    torch.testing.assert_close(exponentials(edges), edges.exp(), rtol=0, atol=0, equal_nan=True)


def test_standard_deviation_and_variance(case: Case) -> None:
    if case.backend != "cpu":
        pytest.skip("the bound is the host's")
    s = torch.linspace(-80, 80, 1 << 20)
    sigma, variance = fused_ib_variance(s, case.backend)
    assert relative_error(sigma, (s.double() / 2).exp()) <= 2 * 2.0**-23
    large = s > 10  # below, the KL's other terms round the variance away
    assert relative_error(variance[large], s.double()[large].exp()) <= 3 * 2.0**-23
