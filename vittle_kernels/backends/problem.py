"""What a backend is handed, and the layouts that the kernels read without a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The inputs that forward and backward share; ``fused_ib`` documents and validates them."""

    posterior: Tensor  # (..., 2 D)
    alpha: Tensor  # fp32, 0-d
    prior: Tensor | None  # (2 D,) or (G, 2 D)
    rows: Tensor | None  # int64 (N,)
    offsets: Tensor | None  # int32 (G,)
    seed: Tensor  # int64 (1,)
    logvar_bound: float | None

    @property
    def width(self) -> int:
        """D."""
        return self.posterior.shape[-1] // 2

    @property
    def tokens(self) -> int:
        """N."""
        return self.posterior.numel() // self.posterior.shape[-1]

    @property
    def groups(self) -> int:
        """G."""
        return 1 if self.prior is None or self.prior.dim() == 1 else self.prior.shape[0]


class RowLayout(NamedTuple):
    """Rows of contiguous elements: row r starts at (r // inner) outer_stride + (r % inner) inner_stride."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(tensor: Tensor) -> RowLayout:
    """The rows of a tensor, without a copy where its leading dimensions collapse to at most two strides.

    That covers halves of a chunk, slices of the sequence and slices of the batch. Anything else, such as a
    transposed last dimension or an expanded gradient, is made contiguous first.
    """
    levels = _collapse(tensor)
    if levels is None:
        tensor = tensor.contiguous()
        levels = _collapse(tensor)
        assert levels is not None
    (inner, inner_stride), (_, outer_stride) = (*levels, (1, 0), (1, 0))[:2]
    return RowLayout(tensor, inner, outer_stride, inner_stride)


def _collapse(tensor: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the leading dimensions, innermost first and merged; None if the kernels cannot read it."""
    levels: list[tuple[int, int]] = []
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (size * levels[-1][0], levels[-1][1])
        else:
            levels.append((size, stride))
    return levels if len(levels) <= 2 else None


def prior_rows(prior: Tensor | None) -> Tensor | None:
    """The prior as the kernels read it: fp32, contiguous."""
    return None if prior is None else prior.to(torch.float32).contiguous()
