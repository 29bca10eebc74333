"""``fused_ib``: sample, interpolation and closed-form KL of the bottleneck in one pass, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vittle_kernels.ops  # noqa: F401  (registers the operator pair)
from vittle_kernels.backends import resolve_backend

LOGVAR_BOUND = math.log(10)
"""The released Vittle code keeps the posterior's variance in [0.1, 10]."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FusedIBFunction(torch.autograd.Function):
    """The op pair with its gradient. Backward keeps ``posterior`` and the seed; the noise is drawn again.

    ``apply`` takes validated tensors; :func:`fused_ib` is the public form. The gradient passes straight through the
    bound on the log-variance, and ``alpha`` gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        """Returns ``out`` and ``kl``."""
        ctx.save_for_backward(posterior, alpha, prior, rows, offsets, seed)
        ctx.logvar_bound, ctx.backend = logvar_bound, backend
        out, kl = torch.ops.vittle_kernels.fused_ib_forward(
            hidden, posterior, alpha, prior, rows, offsets, seed, logvar_bound, backend
        )
        return out, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden, posterior and prior."""
        need_hidden, _, _, need_prior = ctx.needs_input_grad[:4]
        grad_hidden, grad_posterior, grad_prior = torch.ops.vittle_kernels.fused_ib_backward(
            grad_out, grad_kl, need_hidden, *ctx.saved_tensors, ctx.logvar_bound, ctx.backend
        )
        gradients = (
            grad_hidden if need_hidden else None,
            grad_posterior,
            None,
            grad_prior if need_prior else None,
        )
        return *gradients, None, None, None, None, None


def fused_ib(
    hidden: Tensor,
    posterior: Tensor,
    alpha: float | Tensor,
    *,
    prior: Tensor | None = None,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    seed: int | Tensor | None = None,
    logvar_bound: float | None = LOGVAR_BOUND,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Samples each token's posterior, interpolates with the token and measures the KL to the prior, in one pass.

    Vittle (arXiv 2505.13946): z = mu + exp(s/2) eps; out = (1 - alpha) hidden + alpha z;
    kl = mean over D of 1/2 [v - s + (exp(s) + (mu - m)^2) exp(-v) - 1]. All arithmetic is fp32, rounded once. The
    noise is a pure function of (seed, token, column): see :mod:`vittle_kernels.noise`.

    Args:
        hidden: (..., D), fp32, bf16 or fp16 (fp64: eager only): the tokens' states. Rows of any stride are read in
            place.
        posterior: (..., 2 D) of any of these dtypes: mean mu, then log-variance s, as a head emits them.
        alpha: interpolation weight in [0, 1]; or a 0-d fp32 tensor on hidden's device, which is read there, so that
            a schedule neither recompiles nor breaks a captured graph. It gets no gradient.
        prior: None for N(0, I); (2 D,) mean m, then log-variance v; or (G, 2 D), one for each group of ``offsets``.
        rows: int64 (N,), a permutation of all N tokens: posterior row i belongs to token rows[i] of the flattened
            hidden. None: to token i.
        offsets: int32 (G,), where each group of posterior rows ends, as ``torch.nn.functional.grouped_mm`` takes it.
        seed: None draws one from torch's generator of the device (inside a checkpointed region that needs
            ``preserve_rng_state=True``); an int in [-2^63, 2^64), taken mod 2^64; or an int64 tensor of 1 element,
            read on the device.
        logvar_bound: |s| is bounded by it; the gradient passes straight through. None: unbounded.
        backend: "auto", "eager", "cpu", "triton" or "cuda"; a named one is never replaced silently.

    Returns:
        ``out`` (..., D) in hidden's dtype, and ``kl`` (...) in fp32 nats, one a token in token order.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, device, shape or range, named in the message.
        RuntimeError: the named backend cannot serve these tensors, with the reason.
    """
    _check_state(hidden, posterior, rows)
    if prior is not None or offsets is not None:
        _check_prior(hidden, prior, offsets)
    if rows is not None:
        _check_rows(hidden, rows)
    if logvar_bound is not None and not logvar_bound > 0:
        raise ValueError(f"logvar_bound is {logvar_bound}; must be positive, or None for no bound")
    is_double = torch.float64 in (hidden.dtype, posterior.dtype)
    backend = resolve_backend(backend, hidden.device.type, hidden.device.index, is_double)
    out, kl = FusedIBFunction.apply(
        hidden,
        posterior,
        _alpha_tensor(alpha, hidden.device),
        prior,
        rows if rows is None else rows.contiguous(),
        offsets if offsets is None else offsets.contiguous(),
        _seed_tensor(seed, hidden.device),
        logvar_bound,
        backend,
    )
    return out, kl


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"


def _check_state(hidden: Tensor, posterior: Tensor, rows: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("posterior", posterior)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} is {_describe(tensor)}; must be a float32, bfloat16 or float16 tensor")
    if hidden.dim() == 0 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden is {_describe(hidden)}; must be (..., D) with D >= 1")
    expected = (*hidden.shape[:-1], 2 * hidden.shape[-1])
    flat = (math.prod(hidden.shape[:-1]), expected[-1])
    if tuple(posterior.shape) != expected and (rows is None or tuple(posterior.shape) != flat):
        raise ValueError(f"posterior is {_describe(posterior)}; must be {expected}: 2 D columns for each row of hidden")
    _check_device("posterior", posterior, hidden)


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device}; must be on hidden's device, {hidden.device}")


def _check_prior(hidden: Tensor, prior: Tensor | None, offsets: Tensor | None) -> None:
    tokens, columns = hidden.numel() // hidden.shape[-1], 2 * hidden.shape[-1]
    if prior is not None:
        if not isinstance(prior, Tensor) or not prior.dtype.is_floating_point:
            raise TypeError(f"prior is {_describe(prior)}; must be a floating-point tensor or None")
        if prior.dim() not in (1, 2) or prior.shape[-1] != columns or prior.shape[0] < 1:
            raise ValueError(f"prior is {_describe(prior)}; must be (2 D,) = ({columns},) or (G, {columns})")
        _check_device("prior", prior, hidden)
        if prior.dim() == 2 and prior.shape[0] > 1 and offsets is None:
            raise ValueError(f"offsets is None; must say where each of the {prior.shape[0]} groups of prior ends")
    if offsets is None:
        return
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        raise TypeError(f"offsets is {_describe(offsets)}; must be an int32 tensor")
    groups = prior.shape[0] if prior is not None and prior.dim() == 2 else offsets.numel()
    if offsets.dim() != 1 or offsets.numel() != groups or groups < 1:
        raise ValueError(f"offsets is {_describe(offsets)}; must be ({groups},), one end for each group of prior")
    _check_device("offsets", offsets, hidden)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = offsets.tolist()
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] != tokens:
            raise ValueError(f"offsets is {ends}; must not decrease and must end at the number of tokens, {tokens}")


def _check_rows(hidden: Tensor, rows: Tensor) -> None:
    tokens = hidden.numel() // hidden.shape[-1]
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows is {_describe(rows)}; must be an int64 tensor")
    if rows.dim() != 1 or rows.numel() != tokens:
        raise ValueError(f"rows is {_describe(rows)}; must be ({tokens},), one entry for each token")
    _check_device("rows", rows, hidden)
    if rows.device.type == "cpu" and tokens > 0 and not torch.compiler.is_compiling():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= tokens:
            raise ValueError(f"rows has an entry {low if low < 0 else high}; must be in [0, {tokens})")
        counts = torch.bincount(rows, minlength=tokens)
        if int(counts.max()) > 1:
            raise ValueError(f"rows names token {int(counts.argmax())} more than once; must be a permutation")


def _alpha_tensor(alpha: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0 or alpha.dtype != torch.float32:
            raise TypeError(f"alpha is {_describe(alpha)}; must be a float, or a 0-d float32 tensor")
        if alpha.device != device:
            raise ValueError(f"alpha is on {alpha.device}; must be on hidden's device, {device}")
        return alpha.detach()
    if not isinstance(alpha, (float, int)) or isinstance(alpha, bool):
        raise TypeError(f"alpha is {_describe(alpha)}; must be a float, or a 0-d float32 tensor")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; must be in [0, 1]")
    return torch.full((), alpha, dtype=torch.float32, device=device)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed is {_describe(seed)}; must be None, an int, or an int64 tensor of 1 element")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}; must be on hidden's device, {device}")
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed is {_describe(seed)}; must be None, an int, or an int64 tensor of 1 element")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; must be in [-2^63, 2^64)")
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
