"""Linear layers of several groups of rows in one call, and the permutation that sorts rows into groups.

``torch.nn.functional.grouped_mm`` does it without a host sync, but takes bf16 in aligned shapes only (2.13 runs other
dtypes eagerly, yet refuses to trace them); everything else goes group by group, which on a GPU waits for ``offsets``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "vittle_kernels::grouped_linear",
    "(Tensor x, Tensor weight, Tensor bias, Tensor offsets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "vittle_kernels::grouped_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor offsets, bool need_x) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0


def _membership(offsets: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(N, G): 1 where row i is of group g. A product with it adds the bias, another one sums the bias's gradient."""
    index = torch.arange(rows, device=offsets.device).unsqueeze(1)
    ends = offsets.unsqueeze(0)
    starts = F.pad(ends, (1, 0))[:, :-1]
    return ((index >= starts) & (index < ends)).to(dtype)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends], ends, strict=False))


@torch.library.impl("vittle_kernels::grouped_linear", "default")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    if _has_grouped_mm(x, weight):
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
        return y.addmm_(_membership(offsets, x.shape[0], x.dtype), bias)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for group, (begin, end) in enumerate(_spans(offsets)):
        torch.addmm(bias[group], x[begin:end], weight[group].t(), out=y[begin:end])
    return y


@torch.library.register_fake("vittle_kernels::grouped_linear")
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.impl("vittle_kernels::grouped_linear_backward", "default")
def _backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    if _has_grouped_mm(x, weight):
        if need_x:
            grad_x = F.grouped_mm(grad, weight, offs=offsets)
        grad_weight = F.grouped_mm(grad.t(), x, offs=offsets)
        return grad_x, grad_weight, _membership(offsets, x.shape[0], x.dtype).t() @ grad
    grad_weight, grad_bias = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
    for group, (begin, end) in enumerate(_spans(offsets)):
        if need_x:
            torch.mm(grad[begin:end], weight[group], out=grad_x[begin:end])
        torch.mm(grad[begin:end].t(), x[begin:end], out=grad_weight[group])
        torch.sum(grad[begin:end], 0, out=grad_bias[group])
    return grad_x, grad_weight, grad_bias


@torch.library.register_fake("vittle_kernels::grouped_linear_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        y: Tensor = torch.ops.vittle_kernels.grouped_linear(x, weight, bias, offsets)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        grad_x, grad_weight, grad_bias = torch.ops.vittle_kernels.grouped_linear_backward(
            grad, x, weight, offsets, need_x
        )
        return grad_x if need_x else None, grad_weight, grad_bias, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Row i of x (N, K) times the weight (G, M, K) of its group plus its bias (G, M): (N, M).

    ``offsets`` int32 (G,) says where each group of rows ends.
    """
    y: Tensor = _GroupedLinear.apply(x, weight, bias, offsets)
    return y


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def take_rows(x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """x[rows] for a permutation; its gradient is a gather by the inverse, not an atomic scatter."""
    y: Tensor = _TakeRows.apply(x, rows, inverse)
    return y
