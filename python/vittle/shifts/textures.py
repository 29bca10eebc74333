"""The random fields that image shifts are made of: fog, frost, glass, snow and the waves of an elastic sheet."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]  # float32 in [0, 1]: (height, width, 3), RGB, or (height, width)
Points = NDArray[np.complex64]  # x + iy
Rng = np.random.Generator

GLASS, ICE = np.array([[0.05, 0.09, 0.16], [0.9, 0.97, 1]], np.float32)


def plasma(height: int, width: int, decay: float, rng: Rng) -> Pixels:
    """The fractal of diamonds and squares on a torus of powers of two that holds the image, from 0 to 1.

    Half the step, 1 / `decay`^2 of the deviation: in ImageNet-C `decay` is of the deviation's square root.
    """
    rows, columns = (1 << (side - 1).bit_length() for side in (height, width))
    step, deviation = min(rows, columns), 1.0
    field = np.zeros((rows, columns), np.float32)

    def wobble(shape: tuple[int, ...]) -> Pixels:
        return np.float32(deviation) * (2 * rng.random(shape, np.float32) - 1)

    field[::step, ::step] = wobble((rows // step, columns // step))
    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = (pairs + np.roll(pairs, -1, axis=1)) / 4 + wobble(corners.shape)
        above = (corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=0)) / 4
        left = (pairs + centres + np.roll(centres, 1, axis=1)) / 4
        field[half::step, half::step] = centres
        field[::step, half::step] = above + wobble(corners.shape)
        field[half::step, ::step] = left + wobble(corners.shape)
        step, deviation = half, deviation / decay**2
    field = field[:height, :width] - field.min()
    return field / max(float(field.max()), 1e-6)


def frost(height: int, width: int, rng: Rng) -> Pixels:
    """Ferns of ice on dark glass, (height, width, 3): curved stems, barbs at 60 degrees and twigs on the barbs."""
    stems, joints = 1 + height * width // 1500, 26
    root = rng.uniform(-30, width + 30, stems) + 1j * rng.uniform(-30, height + 30, stems)
    bend = np.linspace(0, 1, joints) * rng.uniform(-1.2, 1.2, (stems, 1))
    heading = rng.uniform(0, 2 * np.pi, (stems, 1)) + bend
    pieces = (rng.uniform(1, 5, (stems, 1)) * np.exp(1j * heading)).astype(np.complex64)
    along = root[:, None].astype(np.complex64) + np.cumsum(pieces, axis=1) - pieces
    # Barbs are longest a fifth up the stem.
    reach = 12 * np.linspace(0, 1, joints, dtype=np.float32) ** 0.3 * np.linspace(1, 0.05, joints, dtype=np.float32)
    barb_roots, barbs = _sprout(along, pieces * reach, rng)
    up = np.linspace(0.1, 0.9, 6, dtype=np.float32)
    twig_roots, twigs = _sprout(barb_roots[:, None] + up * barbs[:, None], 0.4 * (1 - up) * barbs[:, None], rng)

    ice = 1.6 * _drawn(along.ravel(), pieces.ravel(), 6, height, width)
    ice += 0.9 * _drawn(barb_roots, barbs, 24, height, width)
    ice += 0.6 * _drawn(twig_roots, twigs, 7, height, width)
    grains = 0.25 * rng.standard_exponential((height, width), np.float32)
    haze = cv2.GaussianBlur(ice, (0, 0), 6)
    sharp = cv2.GaussianBlur(ice + grains, (0, 0), 0.6)
    thickness = (sharp + 0.6 * haze) * (0.1 + plasma(height, width, 1.6, rng) ** 2)
    cover = (1 - np.exp(-0.4 * thickness / thickness.mean()))[..., None]
    return (1 - cover) * GLASS + cover * ICE


def _sprout(roots: Points, vectors: Points, rng: Rng) -> tuple[Points, Points]:
    """From each root a branch to either side: 60 degrees off the vector, give or take, and up to as long."""
    shape = (*vectors.shape, 2)
    angles = np.float32(np.pi / 3) + np.float32(0.12) * rng.standard_normal(shape, np.float32)
    lengths = 0.2 + 0.8 * rng.random(shape, np.float32)
    branches = vectors[..., None] * lengths * np.exp(1j * angles * np.array([1, -1], np.float32))
    return np.broadcast_to(roots[..., None], shape).ravel(), branches.ravel()


def _drawn(roots: Points, vectors: Points, samples: int, height: int, width: int) -> Pixels:
    """Lines of unit density for each pixel of their length, as so many points each."""
    points = (roots[:, None] + np.linspace(0, 1, samples, dtype=np.float32) * vectors[:, None]).ravel()
    weights = np.repeat(np.abs(vectors) / samples, samples)
    x, y = np.rint(points.real).astype(np.int64), np.rint(points.imag).astype(np.int64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    drawn = np.bincount((y * width + x)[inside], weights[inside], height * width)
    return drawn.reshape(height, width).astype(np.float32)


def waves(height: int, width: int, sigma: float, rng: Rng) -> Pixels:
    """Noise, uniform in -1 to 1 and independent for each pixel, after a Gaussian blur.

    A wide blur is of the means of blocks, a fraction of sigma wide: they have their pixels' deviation over their side.
    """
    side = max(1, int(sigma / 4))
    noise = (2 * rng.random((-(-height // side), -(-width // side)), np.float32) - 1) / side
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma / side, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(smooth, (width, height), interpolation=cv2.INTER_CUBIC)


def shuffle(height: int, width: int, reach: int, rounds: int, rng: Rng) -> NDArray[np.int64]:
    """A permutation of the flat pixels: in every round each swaps places with one `-reach` to `reach - 1` rows and
    columns off.

    ImageNet-C goes from pixel to pixel. Here those `2 reach` apart, whose swaps cannot meet, go at once.
    """
    place = np.arange(height * width).reshape(height, width)
    source = place.flatten()
    y, x = np.ogrid[:height, :width]
    apart = 2 * reach
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, height, width), np.int32)
        partner = np.clip(y + down, 0, height - 1) * width + np.clip(x + right, 0, width - 1)
        for phase in rng.permutation(apart**2):
            grid = slice(phase // apart, None, apart), slice(phase % apart, None, apart)
            here, there = place[grid].ravel(), partner[grid].ravel()
            source[here], source[there] = source[there], source[here]
    return source
