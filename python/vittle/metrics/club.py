"""CLUB (arXiv 2006.12013): an upper bound of the mutual information of two embeddings, by a net that predicts one."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vittle.errors import UserError, must_be_at_least
from vittle.metrics.embeddings import must_be_embeddings, read_tensors, write_tensors
from vittle.metrics.released import read_club

_ROWS = 1024
"""That are worked on at a time."""


class CLUB(nn.Module):
    """A mutual-information estimate by q(y|x) = N(mu(x), exp(logvar(x))), diagonal, logvar within [-1, 1].

    Its tensors have the released code's names; the released ``CLUB_global.pt`` is a ``CLUB(768, 768, 500)``. The
    estimate bounds the mutual information from above only as far as q fits the data.

    Args:
        x_dim: the width of x.
        y_dim: the width of y.
        hidden_size: twice the width of the hidden layers.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden_size: int) -> None:
        super().__init__()
        must_be_at_least(x_dim=(x_dim, 1), y_dim=(y_dim, 1), hidden_size=(hidden_size, 2))
        self.x_dim, self.y_dim, self.hidden_size = x_dim, y_dim, hidden_size
        half = hidden_size // 2
        self.p_mu = nn.Sequential(nn.Linear(x_dim, half), nn.Tanh(), nn.Linear(half, y_dim))
        self.p_logvar = nn.Sequential(nn.Linear(x_dim, half), nn.Tanh(), nn.Linear(half, y_dim), nn.Tanh())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """mean_i sum_d [ mean_j (mu_i - y_j)^2 - (mu_i - y_i)^2 ] / (2 exp(logvar_i)): a scalar, fp64, in nats.

        The mean over j is (mu_i - mean(y))^2 + var(y), so that memory is linear in n.

        Args:
            x: (n, x_dim), floating, on any device.
            y: (n, y_dim); row i belongs to row i of x.

        Raises:
            UserError: a shape is not as it must be, n < 2, or a value is not finite.
        """
        self._must_fit(x, y)
        weight = next(self.parameters())
        variance, mean = torch.var_mean(y.to(weight.device, torch.float64), 0, correction=0)
        total = mean.new_zeros(())
        for of_x, of_y in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            of_x = of_x.to(weight)
            mu, logvar = self.p_mu(of_x).double(), self.p_logvar(of_x).double()
            gap = (mu - mean).square() + variance - (mu - of_y.to(mu)).square()
            total = total + (gap * torch.exp(-logvar)).sum() / 2
        return total / len(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """mean_i sum_d [ (mu - y)^2 / exp(logvar) + logvar ], twice the negative log-likelihood of q less a constant.

        Args:
            x: (n, x_dim), of the weights' dtype and device.
            y: (n, y_dim), likewise.
        """
        mu, logvar = self.p_mu(x), self.p_logvar(x)
        return ((mu - y).square() * torch.exp(-logvar) + logvar).sum(1).mean()

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        steps: int = 2000,
        batch_size: int = 2048,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> Self:
        """Trains q with Adam, from weights that the seed draws: what the module was before does not matter.

        Args:
            x: (n, x_dim), floating, on any device.
            y: (n, y_dim); row i belongs to row i of x.
            steps: of the optimizer.
            batch_size: samples a step; all of them if there are fewer.
            learning_rate: Adam's.
            seed: of the first weights and of the batches.

        Returns:
            The module itself.

        Raises:
            UserError: an argument is not as it must be.
        """
        self._must_fit(x, y)
        return self.fit_drawn(
            lambda rows: (x[rows.to(x.device)], y[rows.to(y.device)]), len(x),
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
        )  # fmt: skip

    def fit_drawn(
        self,
        draw: Callable[[Tensor], tuple[Tensor, Tensor]],
        count: int,
        *,
        steps: int = 2000,
        batch_size: int = 2048,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: bool = False,
    ) -> Self:
        """As :func:`fit`, of rows that need not be in memory.

        Args:
            draw: x and y of rows by their numbers, in any order.
            count: of the rows.
            steps: as :func:`fit` takes it, like those below.
            batch_size: likewise.
            learning_rate: likewise.
            seed: likewise.
            progress: whether a bar shows.
        """
        must_be_at_least(steps=(steps, 1), batch_size=(batch_size, 1))
        if not 0 < learning_rate < math.inf:
            raise UserError(f"learning_rate is {learning_rate}; must be a number above 0")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.load_state_dict(CLUB(self.x_dim, self.y_dim, self.hidden_size).state_dict())
        weight = next(self.parameters())
        batches = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        for _ in tqdm(range(steps), "training CLUB", unit="step", ncols=80, leave=False, disable=not progress):
            x, y = draw(torch.randperm(count, generator=batches)[:batch_size])
            optimizer.zero_grad()
            self.loss(x.to(weight), y.to(weight)).backward()
            optimizer.step()
        return self

    def _must_fit(self, x: Tensor, y: Tensor) -> None:
        for name, value, width in (("x", x, self.x_dim), ("y", y, self.y_dim)):
            must_be_embeddings(name, value, least=2)
            if value.shape[1] != width:
                raise UserError(f"{name} has shape {tuple(value.shape)}; must be (n, {width}) for this CLUB")
        if len(x) != len(y):
            raise UserError(f"x has {len(x)} rows and y has {len(y)}; must have as many")


def save_club(club: CLUB, path: str | os.PathLike[str]) -> None:
    """Writes a CLUB's weights as safetensors, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_tensors(club.state_dict(), path)


def load_club(path: str | os.PathLike[str]) -> CLUB:
    """A CLUB in fp32 from a file of :func:`save_club`'s, or from the released ``CLUB_global.pt``.

    The latter is a zip that ``torch.save`` wrote, a state dict of fp32 tensors. What its pickle says of them is read,
    and nothing that the pickle names is imported or called.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not a CLUB's.
    """
    path = Path(path)
    tensors = read_club(path, _NAMES) if zipfile.is_zipfile(path) else read_tensors(path)
    if tensors.keys() != _NAMES:
        raise UserError(f"{path} has tensors {sorted(tensors)}; must have a CLUB's: {sorted(_NAMES)}")
    half, y_dim = tensors["p_mu.0.bias"].numel(), tensors["p_mu.2.bias"].numel()
    with torch.device("meta"):
        club = CLUB(max(1, tensors["p_mu.0.weight"].numel() // max(1, half)), max(1, y_dim), max(2, 2 * half))
    for name, wanted in club.state_dict().items():
        if (found := tensors[name]).shape != wanted.shape or not bool(found.isfinite().all()):
            flaw = f"of shape {tuple(found.shape)}" if found.shape != wanted.shape else "with values not finite"
            raise UserError(f"{path} has {name} {flaw}; must be finite and {tuple(wanted.shape)} beside the others")
    club.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return club


_NAMES = {f"p_{net}.{layer}.{kind}" for net in ("mu", "logvar") for layer in (0, 2) for kind in ("weight", "bias")}
