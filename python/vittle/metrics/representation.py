"""The divergence of two sets of representations: Jensen-Shannon, of von Neumann entropies of second moments."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from vittle.errors import UserError, must_be_at_least
from vittle.metrics.embeddings import must_be_embeddings

_ROWS = 1024
"""That are worked on at a time."""


class RepresentationMoments:
    """The second moments of L2-normalised rows, batch by batch, and the entropy and divergence they determine.

    Memory is (dim, dim) in fp64, however many rows there are.

    Args:
        dim: the width of the rows.
        device: that the moments are on.
    """

    def __init__(self, dim: int, device: str | torch.device | None = None) -> None:
        must_be_at_least(dim=(dim, 1))
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        """The sum of the rows' outer products."""
        self.count = 0
        """Of the rows."""

    def update(self, x: Tensor) -> None:
        """Counts a batch of rows.

        Args:
            x: (n, dim), floating, on any device.

        Raises:
            UserError: a shape is not as it must be, or a row is zero or not finite.
        """
        self._add("x", x, least=1)

    def _add(self, name: str, x: Tensor, least: int) -> Self:
        must_be_embeddings(name, x, least)
        if x.shape[1] != len(self.total):
            raise UserError(f"{name} has shape {tuple(x.shape)}; must be (n, {len(self.total)})")
        if bool((is_zero := x.eq(0).all(1)).any()):
            raise UserError(f"{name} has a row of zeros, row {int(is_zero.int().argmax())}; must have none")
        for rows in x.detach().split(_ROWS):
            unit = nn.functional.normalize(rows.to(self.total), dim=1, eps=0)
            self.total.addmm_(unit.T, unit)
        self.count += len(x)
        return self

    @property
    def density(self) -> Tensor:
        """The mean outer product, (dim, dim) in fp64: positive semi-definite, of trace 1.

        Raises:
            UserError: no rows were counted.
        """
        if not self.count:
            raise UserError("the moments are of no rows; must be of at least one")
        return self.total / self.count

    def entropy(self) -> float:
        """The von Neumann entropy of the density, within [0, ln dim]."""
        return _von_neumann_entropy(self.density)

    def jsd(self, other: RepresentationMoments) -> float:
        """The Jensen-Shannon divergence from other rows, as :func:`representation_jsd`.

        Raises:
            UserError: the widths differ, or one side has no rows.
        """
        if len(other.total) != len(self.total):
            raise UserError(f"other has width {len(other.total)}; must have {len(self.total)}")
        mixture = (self.density + other.density.to(self.total)) / 2
        divergence = _von_neumann_entropy(mixture) - (self.entropy() + other.entropy()) / 2
        return min(max(divergence, 0.0), math.log(2))


def _von_neumann_entropy(matrix: Tensor) -> float:
    """-sum p ln p over the positive eigenvalues, divided by their sum."""
    values = torch.linalg.eigvalsh(matrix)
    values = values[values > 0]
    return float(torch.special.entr(values / values.sum()).sum())


def representation_jsd(x: Tensor, y: Tensor) -> float:
    """S((Cx + Cy) / 2) - (S(Cx) + S(Cy)) / 2, within [0, ln 2]: the divergence of two sets of representations.

    C is the uncentred mean outer product of L2-normalised rows, and S the von Neumann entropy. The released code sums
    where this takes means, which is the same for as many rows on both sides; else its mixture leans to the larger
    set while its two entropies count alike, and its value can be negative.

    Args:
        x: (n, d), floating.
        y: (m, d), floating.

    Raises:
        UserError: a shape is not as it must be, there are fewer than 2 rows, or a row is zero or not finite.
    """
    must_be_embeddings("x", x)
    of_x, of_y = (RepresentationMoments(x.shape[1], x.device) for _ in range(2))
    return of_x._add("x", x, least=2).jsd(of_y._add("y", y, least=2))
