"""The sixteen image corruptions of MM_Robustness that need no model, with the constants of ImageNet-C.

The constants (Hendrycks & Dietterich, 2019) were set for photographs of 224 pixels a side. Those that count pixels, the
blurs' widths, the flakes of snow, the displacements and the blocks of JPEG, bite harder on smaller images. Every kind
grows with severity but elastic_transform, whose published constants bend most at severities 1 and 2.

No package is used: imagecorruptions is dead, and its fork needs numba, OpenCV's windows and NumPy's global noise.
"""

from __future__ import annotations

import difflib
import io
import numbers
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from vittle.errors import UserError
from vittle.pictures import rgb
from vittle.shifts.textures import Pixels, Rng, frost, plasma, shuffle, waves

Corruption = Callable[..., Pixels]  # (height, width, 3) pixels, a generator and the severity's constants

SEVERITIES = range(1, 6)


def gaussian_noise(pixels: Pixels, rng: Rng, std: float) -> Pixels:
    return pixels + np.float32(std) * rng.standard_normal(pixels.shape, np.float32)


def shot_noise(pixels: Pixels, rng: Rng, photons: float) -> Pixels:
    return (rng.poisson(pixels * photons) / photons).astype(np.float32)


def impulse_noise(pixels: Pixels, rng: Rng, amount: float) -> Pixels:
    """Sets a share `amount` of all channel values to 0 or 1, half of them each."""
    draw = rng.random(pixels.shape, np.float32)
    return np.where(draw < amount, draw < amount / 2, pixels).astype(np.float32)


def speckle_noise(pixels: Pixels, rng: Rng, std: float) -> Pixels:
    return pixels + pixels * np.float32(std) * rng.standard_normal(pixels.shape, np.float32)


def defocus_blur(pixels: Pixels, rng: Rng, radius: int, alias: float) -> Pixels:
    """A disc's mean, the disc's edge softened by a Gaussian of sigma `alias`."""
    return cv2.filter2D(pixels, -1, disc(radius, alias))


def disc(radius: int, alias: float) -> Pixels:
    y, x = np.mgrid[-radius - 2 : radius + 3, -radius - 2 : radius + 3]
    soft = cv2.GaussianBlur((x**2 + y**2 <= radius**2).astype(np.float32), (0, 0), alias)
    return soft / soft.sum()


def glass_blur(pixels: Pixels, rng: Rng, sigma: float, reach: int, rounds: int) -> Pixels:
    """Swaps pixels with near ones, between two Gaussian blurs."""
    height, width, _ = pixels.shape
    smooth = cv2.GaussianBlur(pixels, (0, 0), sigma).reshape(-1, 3)
    shuffled = smooth[shuffle(height, width, reach, rounds, rng)]
    return cv2.GaussianBlur(shuffled.reshape(pixels.shape), (0, 0), sigma)


def motion_blur(pixels: Pixels, rng: Rng, radius: int, sigma: float) -> Pixels:
    return streaked(pixels, radius, sigma, rng.uniform(-45, 45))


def streaked(pixels: Pixels, radius: int, sigma: float, degrees: float) -> Pixels:
    """The mean along a line, weighted by half a Gaussian: ImageMagick's motion blur."""
    kernel, anchor = streak(radius, sigma, degrees)
    return cv2.filter2D(pixels, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)


def streak(radius: int, sigma: float, degrees: float) -> tuple[Pixels, tuple[int, int]]:
    """The weights of `2 radius + 1` steps in the given direction, and the place among them of its start."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-((steps / sigma) ** 2) / 2)
    x, y = (np.rint(steps * turn(np.deg2rad(degrees))).astype(int) for turn in (np.cos, np.sin))
    kernel = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1), np.float32)
    np.add.at(kernel, (y - y.min(), x - x.min()), weights / weights.sum())
    return kernel, (-int(x.min()), -int(y.min()))


def zoom_blur(pixels: Pixels, rng: Rng, stop: float, step: float) -> Pixels:
    """The mean of the image and its enlargements about the centre, by 1 to `stop`."""
    height, width, _ = pixels.shape
    zooms = np.arange(1, stop, step)
    total = pixels.copy()
    for zoom in zooms:
        scale, right, down = 1 / zoom, (width - 1) / 2 * (1 - 1 / zoom), (height - 1) / 2 * (1 - 1 / zoom)
        onto = np.array([[scale, 0, right], [0, scale, down]])
        total += cv2.warpAffine(
            pixels,
            onto,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return total / np.float32(len(zooms) + 1)


def snow(
    pixels: Pixels,
    rng: Rng,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Pixels:
    """Enlarged noise above a threshold is flakes, which fall over a whitened image; so do they turned about."""
    height, width, _ = pixels.shape
    noise = mean + std * rng.standard_normal((int(np.ceil(height / zoom)), int(np.ceil(width / zoom))), np.float32)
    flakes = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1)).astype(np.float32)
    flakes = streaked(flakes, radius, sigma, rng.uniform(-135, -45))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    whitened = kept * pixels + (1 - kept) * np.maximum(pixels, 1.5 * grey + 0.5)
    return whitened + (flakes + np.rot90(flakes, 2))[..., None]


def frosted(pixels: Pixels, rng: Rng, kept: float, ice: float) -> Pixels:
    height, width, _ = pixels.shape
    return kept * pixels + ice * frost(height, width, rng)


def fog(pixels: Pixels, rng: Rng, amount: float, decay: float) -> Pixels:
    """Adds a cloud, then scales so that the brightest under the thickest is as bright as it was."""
    height, width, _ = pixels.shape
    brightest = float(pixels.max())
    clouded = pixels + amount * plasma(height, width, decay, rng)[..., None]
    return clouded * (brightest / (brightest + amount))


def brightness(pixels: Pixels, rng: Rng, offset: float) -> Pixels:
    """Adds `offset` to the V of HSV, hue and saturation kept."""
    value = np.maximum.reduce(cv2.split(pixels))[..., None]
    raised = np.minimum(value + offset, 1)
    # A colour of given hue and saturation is proportional to its V; black has neither and turns grey.
    return np.where(value > 0, pixels * (raised / np.where(value > 0, value, 1)), raised)


def contrast(pixels: Pixels, rng: Rng, factor: float) -> Pixels:
    """Draws every channel towards its mean over the image."""
    mean = pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return (pixels - mean) * factor + mean


def pixelate(pixels: Pixels, rng: Rng, scale: float) -> Pixels:
    image = _image(pixels)
    width, height = image.size
    small = image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX)
    return _pixels(small.resize(image.size, Image.Resampling.NEAREST))


def elastic_transform(pixels: Pixels, rng: Rng, alpha: float, sigma: float, jitter: float) -> Pixels:
    """Looks each pixel up where waves and an affine map, of three points moved at random, displace it to."""
    height, width, _ = pixels.shape
    side = max(1, min(height, width) // 3)
    square = np.array([width // 2, height // 2]) + side * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = square + rng.uniform(-jitter, jitter, (3, 2))
    affine = cv2.getAffineTransform(square.astype(np.float32), moved.astype(np.float32)).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x += alpha * waves(height, width, sigma, rng)
    y += alpha * waves(height, width, sigma, rng)
    from_x, from_y = (row[0] * x + row[1] * y + row[2] for row in affine)
    return cv2.remap(pixels, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def jpeg_compression(pixels: Pixels, rng: Rng, quality: int) -> Pixels:
    buffer = io.BytesIO()
    _image(pixels).save(buffer, "JPEG", quality=quality)
    return _pixels(Image.open(buffer))


IMAGE_SHIFTS: dict[str, tuple[Corruption, dict[str, tuple[float, ...]]]] = {
    "gaussian_noise": (gaussian_noise, {"std": (0.08, 0.12, 0.18, 0.26, 0.38)}),
    "shot_noise": (shot_noise, {"photons": (60, 25, 12, 5, 3)}),
    "impulse_noise": (impulse_noise, {"amount": (0.03, 0.06, 0.09, 0.17, 0.27)}),
    "speckle_noise": (speckle_noise, {"std": (0.15, 0.2, 0.35, 0.45, 0.6)}),
    "defocus_blur": (defocus_blur, {"radius": (3, 4, 6, 8, 10), "alias": (0.1, 0.5, 0.5, 0.5, 0.5)}),
    "glass_blur": (glass_blur, {"sigma": (0.7, 0.9, 1, 1.1, 1.5), "reach": (1, 2, 2, 3, 4), "rounds": (2, 1, 3, 2, 2)}),
    "motion_blur": (motion_blur, {"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15)}),
    "zoom_blur": (zoom_blur, {"stop": (1.11, 1.16, 1.21, 1.26, 1.33), "step": (0.01, 0.01, 0.02, 0.02, 0.03)}),
    "snow": (
        snow,
        {
            "mean": (0.1, 0.2, 0.55, 0.55, 0.55),
            "std": (0.3, 0.3, 0.3, 0.3, 0.3),
            "zoom": (3, 2, 4, 4.5, 2.5),
            "threshold": (0.5, 0.5, 0.9, 0.85, 0.85),
            "radius": (10, 12, 12, 12, 12),
            "sigma": (4, 4, 8, 8, 12),
            "kept": (0.8, 0.7, 0.7, 0.65, 0.55),
        },
    ),
    "frost": (frosted, {"kept": (1, 0.8, 0.7, 0.65, 0.6), "ice": (0.4, 0.6, 0.7, 0.7, 0.75)}),
    "fog": (fog, {"amount": (1.5, 2, 2.5, 2.5, 3), "decay": (2, 2, 1.7, 1.5, 1.4)}),
    "brightness": (brightness, {"offset": (0.1, 0.2, 0.3, 0.4, 0.5)}),
    "contrast": (contrast, {"factor": (0.4, 0.3, 0.2, 0.1, 0.05)}),
    "pixelate": (pixelate, {"scale": (0.6, 0.5, 0.4, 0.3, 0.25)}),
    "elastic_transform": (
        elastic_transform,
        {
            "alpha": (488, 488, 12.2, 17.08, 29.28),
            "sigma": (170.8, 19.52, 2.44, 2.44, 2.44),
            "jitter": (24.4, 48.8, 4.88, 4.88, 4.88),
        },
    ),
    "jpeg_compression": (jpeg_compression, {"quality": (25, 18, 15, 10, 7)}),
}
"""Each kind with its constants at severities 1 to 5."""


def image_shift(image: Image.Image, kind: str, severity: int, *, seed: int) -> Image.Image:
    """`image` under `kind` of `IMAGE_SHIFTS` at `severity` 1 to 5: RGB, of the same size.

    An image of any mode may come in, with sides up to OpenCV's 32,766 pixels. Its transparency is dropped. What is
    random depends on `kind` and `seed`, any integer, and the image's size: give each image of a set its own seed.

    Raises:
        UserError: there is no such kind or severity, the seed is no integer, or the image is too large or empty.
    """
    if kind not in IMAGE_SHIFTS:
        near = difflib.get_close_matches(str(kind), IMAGE_SHIFTS) or IMAGE_SHIFTS
        raise UserError(f"kind is {kind!r}; it must be an image shift such as {', '.join(near)}")
    if not _is_integer(severity) or severity not in SEVERITIES:
        raise UserError(f"severity is {severity!r}; it must be an integer from 1 to 5")
    if not _is_integer(seed):
        raise UserError(f"seed is {seed!r}; it must be an integer")
    if not 0 < min(image.size) <= max(image.size) < 2**15 - 1:
        raise UserError(f"image is {image.width}x{image.height} pixels; its sides must be from 1 to 32766")
    shift, constants = IMAGE_SHIFTS[kind]
    rng = np.random.default_rng([zlib.crc32(kind.encode()), int(seed < 0), abs(int(seed))])
    at_severity = {name: values[severity - 1] for name, values in constants.items()}
    return _image(shift(_pixels(rgb(image)), rng, **at_severity))


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32) / 255


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
