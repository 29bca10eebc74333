"""How much of a model's attention each object of a picture gets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vittle.errors import UserError


def significance(attention: NDArray[Any], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of an attention map inside each mask; VPG-C (arXiv 2308.04152, section 2.2) edits the objects of least.

    The map covers the picture and is brought to its size bilinearly, pixel centres where they are, so that a patch
    weighs in each of its pixels.

    Args:
        attention: numbers (h, w), any scale and size.
        masks: bool (n, H, W), True inside the object.

    Returns:
        float64 (n,), on the map's scale.

    Raises:
        UserError: the map is no finite (h, w), or the masks are no bool (n, H, W) of a pixel or more each.
    """
    if attention.ndim != 2 or not attention.size or not np.isfinite(attention).all():
        raise UserError(f"attention of shape {attention.shape} must be a map (h, w) of finite numbers")
    if masks.ndim != 3 or masks.dtype != bool or not masks.any(axis=(1, 2)).all():
        raise UserError(f"masks of shape {masks.shape}, {masks.dtype} must be bool (n, H, W), none of them empty")
    height, width = masks.shape[1:]
    fine = interpolated(attention, (width, height))
    return np.array([fine[mask].mean() for mask in masks])


def unit(attention: NDArray[Any]) -> NDArray[Any]:
    """A map from 0, its least, to 1, its most."""
    low, high = attention.min(), attention.max()
    return (attention - low) / (high - low or 1)


def interpolated(attention: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
    """A map (h, w) at a picture's size, (width, height), bilinearly: (height, width)."""
    coarse = Image.fromarray(attention.astype(np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
