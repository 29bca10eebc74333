"""Pictures of any mode as 8-bit RGB, which models and shifts take."""

from __future__ import annotations

import numpy as np
from PIL import Image


def rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, without its transparency.

    Pillow clips what is deeper than 8 bits; here it is scaled down. White is 65535 in 16 bits; in 32 and in floats the
    least of 1 (floats only), 255 and 65535 that holds all, or else the largest value.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        opaque = image.convert("RGBA") if image.mode == "P" else image  # Pillow warns of a palette's transparency
        return opaque.convert("RGB")
    values = np.asarray(image, dtype=np.float32)
    peak = values.max(initial=0, where=np.isfinite(values))
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    grey = np.nan_to_num(values / next((white for white in whites if peak <= white), peak)).clip(0, 1)
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
