"""The divergence of two sets of representations: Jensen-Shannon, of von Neumann entropies of second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

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
        must_be_embeddings("x", x)
        if x.shape[1] != len(self.total):
            raise UserError(f"x has shape {tuple(x.shape)}; must be (n, {len(self.total)})")
        _must_have_no_zeros("x", x)
        for rows in x.detach().split(_ROWS):
            unit = _unit(rows, self.total.device)
            self.total.addmm_(unit.T, unit)
        self.count += len(x)

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


def _must_have_no_zeros(name: str, rows: Tensor) -> None:
    if bool((is_zero := rows.eq(0).all(1)).any()):
        raise UserError(f"{name} has a row of zeros, row {int(is_zero.int().argmax())}; must have none")


def _unit(rows: Tensor, device: torch.device) -> Tensor:
    return nn.functional.normalize(rows.to(device, torch.float64), dim=1, eps=0)


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
    return Spectrum("x", x).jsd(Spectrum("y", y))


class Spectrum:
    """Rows whose divergences from others are asked for more than once: their own entropy is worked out once.

    Where the rows of both sides are fewer than they are wide, the matrices are those of their inner products, which
    have the same eigenvalues but zeros: eigenvalues take time cubic in the smaller of both.

    Args:
        name: of the argument, for messages.
        rows: (n, d), floating.

    Raises:
        UserError: the shape is not as it must be, there are fewer than 2 rows, or a row is zero or not finite.
    """

    def __init__(self, name: str, rows: Tensor) -> None:
        must_be_embeddings(name, rows, least=2)
        _must_have_no_zeros(name, rows)
        self._name, self._rows = name, rows.detach()

    @cached_property
    def entropy(self) -> float:
        """The von Neumann entropy of the rows' density."""
        return _entropy([self._rows])

    def jsd(self, other: Spectrum) -> float:
        """As :func:`representation_jsd`.

        Raises:
            UserError: the widths differ.
        """
        width = self._rows.shape[1]
        if other._rows.shape[1] != width:
            raise UserError(f"{other._name} has shape {tuple(other._rows.shape)}; must be (n, {width})")
        divergence = _entropy([self._rows, other._rows]) - (self.entropy + other.entropy) / 2
        return min(max(divergence, 0.0), math.log(2))


def _entropy(sides: Sequence[Tensor]) -> float:
    """Of the mean of the sides' densities."""
    count, width, device = sum(map(len, sides)), sides[0].shape[1], sides[0].device
    if count < width:
        units = [_unit(rows, device) / math.sqrt(len(sides) * len(rows)) for rows in sides]
        joined = torch.cat(units)
        return _von_neumann_entropy(joined @ joined.T)
    density = torch.zeros(width, width, dtype=torch.float64, device=device)
    for rows in sides:
        for part in rows.split(_ROWS):
            unit = _unit(part, device)
            density.addmm_(unit.T, unit, alpha=1 / (len(sides) * len(rows)))
    return _von_neumann_entropy(density)
