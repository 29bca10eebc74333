"""Image corruptions in five severities, with the constants of ImageNet-C (Hendrycks & Dietterich, 2019).

The constants were set for photographs of 224 pixels a side. Those that count pixels, the blur's sigma and the
blocks of JPEG, bite harder on smaller images.
"""

from __future__ import annotations

import difflib
import io
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vittle.errors import UserError

Pixels = NDArray[np.float64]  # (height, width, 3) in [0, 1]
Rng = np.random.Generator
Shift = Callable[[Image.Image, float, Rng], Image.Image]  # RGB in and out, the severity's constant

SEVERITIES = range(1, 6)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float64) / 255


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


def gaussian_noise(image: Image.Image, std: float, rng: Rng) -> Image.Image:
    pixels = _pixels(image)
    return _image(pixels + rng.normal(scale=std, size=pixels.shape))


def shot_noise(image: Image.Image, photons: float, rng: Rng) -> Image.Image:
    return _image(rng.poisson(_pixels(image) * photons) / photons)


def impulse_noise(image: Image.Image, amount: float, rng: Rng) -> Image.Image:
    """Sets a share `amount` of all channel values to 0 or 1, half of them each."""
    pixels = _pixels(image)
    struck = rng.random(pixels.shape) < amount
    return _image(np.where(struck, rng.integers(0, 2, pixels.shape), pixels))


def gaussian_blur(image: Image.Image, sigma: float, rng: Rng) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def contrast(image: Image.Image, factor: float, rng: Rng) -> Image.Image:
    """Draws every channel towards its mean over the image."""
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1))
    return _image((pixels - mean) * factor + mean)


def brightness(image: Image.Image, offset: float, rng: Rng) -> Image.Image:
    """Adds `offset` to the V of HSV, hue and saturation kept."""
    pixels = _pixels(image)
    value = pixels.max(axis=2, keepdims=True)
    raised = np.minimum(value + offset, 1)
    # A colour of given hue and saturation is proportional to its V; black has neither and turns grey.
    return _image(np.where(value > 0, pixels * raised / np.where(value > 0, value, 1), raised))


def pixelate(image: Image.Image, scale: float, rng: Rng) -> Image.Image:
    width, height = image.size
    small = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def jpeg_compression(image: Image.Image, quality: float, rng: Rng) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    return Image.open(buffer).convert("RGB")


# Each kind with its constants at severities 1 to 5.
IMAGE_SHIFTS: dict[str, tuple[Shift, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}


def image_shift(image: Image.Image, kind: str, severity: int, *, seed: int) -> Image.Image:
    """`image` under `kind` of `IMAGE_SHIFTS` at `severity` 1 to 5: RGB, of the same size.

    An image of any mode and size may come in. The noise depends on `seed`, `kind` and `severity` alone:
    give each image of a set its own seed.

    Raises:
        UserError: there is no such kind or severity.
    """
    if kind not in IMAGE_SHIFTS:
        near = difflib.get_close_matches(kind, IMAGE_SHIFTS) or IMAGE_SHIFTS
        raise UserError(f"kind is {kind!r}; it must be an image shift such as {', '.join(near)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity is {severity!r}; it must be an integer from 1 to 5")
    shift, constants = IMAGE_SHIFTS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), severity])
    return shift(image.convert("RGB"), constants[severity - 1], rng)
