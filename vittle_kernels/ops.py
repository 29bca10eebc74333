"""The registered operator pair: what ``torch.compile`` sees, opaque and with fake implementations.

``torch.ops.vittle_kernels.fused_ib_forward`` and ``..._backward`` take validated tensors and a resolved backend's
name. They have no autograd of their own; :class:`vittle_kernels.functional.FusedIBFunction` adds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vittle_kernels.backends import get_backend
from vittle_kernels.backends.problem import Problem

_PROBLEM = (
    "Tensor posterior, Tensor alpha, Tensor? prior, Tensor? rows, Tensor? offsets, Tensor seed, "
    "float? logvar_bound, str backend"
)
torch.library.define(
    "vittle_kernels::fused_ib_forward",
    f"(Tensor hidden, {_PROBLEM}) -> (Tensor out, Tensor kl)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "vittle_kernels::fused_ib_backward",
    f"(Tensor grad_out, Tensor grad_kl, bool need_hidden, {_PROBLEM})"
    " -> (Tensor grad_hidden, Tensor grad_posterior, Tensor grad_prior)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("vittle_kernels::fused_ib_forward", "default")
def _forward(
    hidden: Tensor,
    posterior: Tensor,
    alpha: Tensor,
    prior: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor,
    logvar_bound: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(posterior, alpha, prior, rows, offsets, seed, logvar_bound)
    out, kl = get_backend(backend).forward(problem, hidden)
    return out, kl


@torch.library.register_fake("vittle_kernels::fused_ib_forward")
def _forward_fake(
    hidden: Tensor,
    posterior: Tensor,
    alpha: Tensor,
    prior: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor,
    logvar_bound: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kl_dtype = torch.promote_types(posterior.dtype, torch.float32)
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[:-1], dtype=kl_dtype)


@torch.library.impl("vittle_kernels::fused_ib_backward", "default")
def _backward(
    grad_out: Tensor,
    grad_kl: Tensor,
    need_hidden: bool,
    posterior: Tensor,
    alpha: Tensor,
    prior: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor,
    logvar_bound: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(posterior, alpha, prior, rows, offsets, seed, logvar_bound)
    grad_hidden, grad_posterior, grad_prior = get_backend(backend).backward(problem, grad_out, grad_kl, need_hidden)
    return (
        grad_out.new_empty(0) if grad_hidden is None else grad_hidden,
        grad_posterior,
        posterior.new_empty(0) if grad_prior is None else grad_prior,
    )


@torch.library.register_fake("vittle_kernels::fused_ib_backward")
def _backward_fake(
    grad_out: Tensor,
    grad_kl: Tensor,
    need_hidden: bool,
    posterior: Tensor,
    alpha: Tensor,
    prior: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    seed: Tensor,
    logvar_bound: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad_out.new_empty(grad_out.shape if need_hidden else 0),
        posterior.new_empty(posterior.shape),
        posterior.new_empty(0) if prior is None else prior.new_empty(prior.shape),
    )
