"""Calls into ``csrc``: the library is built without torch, so it is handed addresses, strides and sizes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from vittle_kernels.backends.problem import Problem, RowLayout, prior_rows, row_layout

_native: Any = None
try:
    _native = importlib.import_module("vittle_kernels._native")
except ImportError as error:
    _import_error = str(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def library() -> Any:
    """The compiled module, or None where it was not built."""
    return _native


def why_not_built() -> str | None:
    """None where the library is there and loads."""
    if _native is not None:
        return None
    return f"the C++ library is not built ({_import_error}): install a C++17 compiler, then this package again"


def target(device: torch.device) -> Any:
    """Where the library runs a call: the CPU with torch's number of threads, or a device and its current stream."""
    if device.type == "cpu":
        return _native.Target(-1, 0, torch.get_num_threads())
    stream = torch.cuda.current_stream(device)
    return _native.Target(stream.device_index, stream.cuda_stream, 1)


def forward(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``out`` like ``hidden`` and ``kl`` (...) in fp32, both in token order."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    kl = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
    if problem.tokens > 0:
        forward_into(problem, hidden, out, kl)
    return out, kl


def forward_into(problem: Problem, hidden: Tensor, out: Tensor, kl: Tensor) -> None:
    """The kernel alone, on contiguous results that are there already."""
    hidden_rows, posterior_rows, prior = (
        row_layout(hidden),
        row_layout(problem.posterior),
        prior_rows(problem.prior),
    )
    _native.forward(
        target(hidden.device),
        *_shared(problem, hidden.dtype, posterior_rows, prior),
        _layout(hidden_rows),
        out.data_ptr(),
        kl.data_ptr(),
    )


def backward(
    problem: Problem, grad_out: Tensor, grad_kl: Tensor, need_hidden: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns the gradients of hidden (None unless needed), posterior and prior (None without one)."""
    device, posterior = grad_out.device, problem.posterior
    grad_hidden = torch.empty(grad_out.shape, dtype=grad_out.dtype, device=device) if need_hidden else None
    grad_posterior = torch.empty(posterior.shape, dtype=posterior.dtype, device=device)
    grad_prior = partials = None
    if problem.prior is not None:
        columns = 2 * problem.width
        blocks = _native.max_row_blocks(problem.tokens, problem.groups)
        partials = torch.empty((blocks, columns), dtype=torch.float32, device=device)
        grad_prior = torch.empty((problem.groups, columns), dtype=torch.float32, device=device)
    if problem.tokens > 0 or grad_prior is not None:
        grad_kl = grad_kl.to(torch.float32).contiguous()
        backward_into(problem, grad_out, grad_kl, grad_hidden, grad_posterior, partials, grad_prior)
    if grad_prior is not None:
        assert problem.prior is not None
        grad_prior = grad_prior.to(problem.prior.dtype).view(problem.prior.shape)
    return grad_hidden, grad_posterior, grad_prior


def backward_into(
    problem: Problem,
    grad_out: Tensor,
    grad_kl: Tensor,
    grad_hidden: Tensor | None,
    grad_posterior: Tensor,
    partials: Tensor | None,
    grad_prior: Tensor | None,
) -> None:
    """The kernel alone, on contiguous fp32 ``grad_kl`` and contiguous results that are there already."""
    grad_rows, posterior_rows, prior = (
        row_layout(grad_out),
        row_layout(problem.posterior),
        prior_rows(problem.prior),
    )
    _native.backward(
        target(grad_out.device),
        *_shared(problem, grad_out.dtype, posterior_rows, prior),
        _layout(grad_rows),
        grad_kl.data_ptr(),
        _address(grad_hidden),
        grad_posterior.data_ptr(),
        _address(partials),
        _address(grad_prior),
    )


def _shared(problem: Problem, hidden_dtype: torch.dtype, posterior: RowLayout, prior: Tensor | None) -> tuple[Any, ...]:
    return (
        problem.tokens,
        problem.width,
        problem.logvar_bound,
        problem.alpha.data_ptr(),
        problem.seed.data_ptr(),
        _address(problem.rows),
        _address(prior),
        _address(problem.offsets),
        problem.groups,
        _DTYPE_CODES[hidden_dtype],
        _DTYPE_CODES[problem.posterior.dtype],
        _layout(posterior),
    )


def _layout(rows: RowLayout) -> tuple[int, int, int, int]:
    return rows.tensor.data_ptr(), rows.inner, rows.outer_stride, rows.inner_stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
