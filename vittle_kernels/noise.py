"""The noise contract in plain PyTorch: every normal is a pure function of (seed, row, column).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
key = (low, high 32 bits of the seed) and counter = (column // 4, row low, row high, 0) gives four words a call.
Words (0, 1) make columns 4q and 4q + 1, words (2, 3) make 4q + 2 and 4q + 3 by Box-Muller, with
u = (word + 1/2) 2^-32. Nothing depends on block size, number of threads, GPU model or how rows are split.
``csrc/philox.h`` and ``backends/triton.py`` follow the same contract.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        seed: int64, one element: the key's low and high words.
        counter: four int64 tensors of words in [0, 2^32) that broadcast together.

    Returns:
        Four int64 tensors of words in [0, 2^32).
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(word + step) & _WORD for word, step in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in two parts because int64 has no room for its top bit."""
    upper = constant * (word >> 16)
    lower = constant * (word & 0xFFFF) + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (lower >> 32), lower & _WORD


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals (fp64) from two words: r cos(a) and r sin(a), r = sqrt(-2 ln u), a = 2 pi u'."""
    radius = torch.sqrt(-2 * torch.log((radius_word.double() + 0.5) * 2.0**-32))
    angle = 2 * math.pi * (angle_word.double() + 0.5) * 2.0**-32
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """The standard normals of whole rows.

    Args:
        seed: int64, one element.
        rows: int64 (N,), the index of each row.
        columns: how many columns.

    Returns:
        fp64 (N, columns), exact to fp64's rounding.
    """
    quads = torch.arange((columns + 3) // 4, device=rows.device)
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    row = rows.unsqueeze(1)
    w0, w1, w2, w3 = philox4x32(seed, (quads, row & _WORD, row >> 32, zero))
    eps = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return eps.flatten(1)[:, :columns]
