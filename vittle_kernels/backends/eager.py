"""The reference: plain PyTorch that reads like the paper (Vittle, arXiv 2505.13946), on any device, also in fp64.

Every other backend is held to it. With h the token's state, q = N(mu, e^s) its posterior and N(m, e^v) the prior:

    z   = mu + e^(s/2) eps
    out = (1 - alpha) h + alpha z
    kl  = mean over D of 1/2 [v - s + (e^s + (mu - m)^2) e^-v - 1]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vittle_kernels.backends.problem import Problem
from vittle_kernels.noise import normals


def why_unavailable(device: torch.device | None) -> str | None:
    """It works everywhere."""
    return None


class _Terms(NamedTuple):
    """Row i of each is posterior row i, which belongs to token ``tokens[i]``."""

    tokens: Tensor
    mu: Tensor
    s: Tensor
    eps: Tensor
    m: Tensor
    v: Tensor
    groups: Tensor


def forward(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``out`` like ``hidden`` and ``kl`` (...), both in token order."""
    tokens, mu, s, eps, m, v, _ = _terms(problem)
    alpha, h = problem.alpha, hidden.reshape(-1, problem.width)[tokens].to(mu.dtype)

    z = mu + torch.exp(s / 2) * eps
    out = (1 - alpha) * h + alpha * z
    kl = 0.5 * (v - s + (torch.exp(s) + (mu - m) ** 2) * torch.exp(-v) - 1)

    return (
        _to_tokens(out, tokens).to(hidden.dtype).view(hidden.shape),
        _to_tokens(kl.mean(-1), tokens).view(hidden.shape[:-1]),
    )


def backward(
    problem: Problem, grad_out: Tensor, grad_kl: Tensor, need_hidden: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns the gradients of hidden (None unless needed), posterior and prior (None without one)."""
    tokens, mu, s, eps, m, v, groups = _terms(problem)
    alpha = problem.alpha
    g = grad_out.reshape(-1, problem.width)[tokens].to(mu.dtype)
    k = grad_kl.reshape(-1, 1)[tokens].to(mu.dtype) / problem.width

    grad_hidden = None
    if need_hidden:
        dh = (1 - alpha) * g
        grad_hidden = _to_tokens(dh, tokens).to(grad_out.dtype).view(grad_out.shape)

    dmu = alpha * g + k * (mu - m) * torch.exp(-v)
    ds = (
        alpha * g * eps * torch.exp(s / 2) / 2 + k * (torch.exp(s) * torch.exp(-v) - 1) / 2
    )  # straight through the bound
    grad_posterior = torch.cat((dmu, ds), -1).to(problem.posterior.dtype).view(problem.posterior.shape)

    grad_prior = None
    if problem.prior is not None:
        dm = -k * (mu - m) * torch.exp(-v)
        dv = k * (1 - (torch.exp(s) + (mu - m) ** 2) * torch.exp(-v)) / 2
        of_rows = torch.cat((dm, dv), -1)
        of_groups = [of_rows[groups == group].sum(0) for group in range(problem.groups)]
        grad_prior = torch.stack(of_groups).to(problem.prior.dtype).view(problem.prior.shape)
    return grad_hidden, grad_posterior, grad_prior


def _terms(problem: Problem) -> _Terms:
    posterior, width = problem.posterior.reshape(-1, 2 * problem.width), problem.width
    dtype = torch.promote_types(posterior.dtype, torch.float32)
    index = torch.arange(problem.tokens, device=posterior.device)
    tokens = index if problem.rows is None else problem.rows

    mu, s = posterior.to(dtype).chunk(2, dim=-1)
    if problem.logvar_bound is not None:
        s = s.clamp(-problem.logvar_bound, problem.logvar_bound)
    eps = normals(problem.seed, tokens, width).to(dtype)

    groups = torch.zeros_like(index)
    if problem.prior is None:
        m = v = torch.zeros((), dtype=dtype, device=posterior.device)
    else:
        if problem.groups > 1:
            assert problem.offsets is not None
            groups = torch.bucketize(index, problem.offsets.long(), right=True).clamp(max=problem.groups - 1)
        m, v = problem.prior.to(dtype).view(-1, 2 * width)[groups].chunk(2, dim=-1)
    return _Terms(tokens, mu, s, eps, m, v, groups)


def _to_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    return torch.empty_like(values).index_copy_(0, tokens, values)
