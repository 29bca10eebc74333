"""Image shifts: their shapes, their determinism, their strength and their refusals."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from vittle.shifts import IMAGE_SHIFTS, SEVERITIES, image_shift


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """61x47 RGB: a colour gradient under a checkerboard of 8 pixels, no channel alike."""
    y, x = np.mgrid[:47, :61]
    checks = 60 * ((x // 8 + y // 8) % 2)
    channels = [40 + 2 * x + checks, 90 + y + checks, 150 - x + checks]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.mean((pixels(one) - pixels(other)) ** 2)))


def random_state() -> str:
    return f"{np.random.get_state()[1].tolist()} {random.getstate()}"


@pytest.mark.parametrize("kind", IMAGE_SHIFTS)
class TestEveryKind:
    def test_is_harsher_with_severity(self, kind: str, picture: Image.Image) -> None:
        distances = [distance(picture, image_shift(picture, kind, s, seed=3)) for s in SEVERITIES]
        assert distances[0] > 0
        assert distances == sorted(set(distances))

    def test_depends_on_its_arguments_alone(self, kind: str, picture: Image.Image) -> None:
        before, state = picture.tobytes(), random_state()
        first = image_shift(picture, kind, 3, seed=5)
        assert first.tobytes() == image_shift(picture, kind, 3, seed=5).tobytes()
        assert (picture.tobytes(), random_state()) == (before, state)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_takes_any_mode_and_size(self, kind: str, mode: str) -> None:
        for size in [(1, 1), (5, 3)]:
            shifted = image_shift(Image.new(mode, size), kind, 5, seed=0)
            assert (shifted.mode, shifted.size) == ("RGB", size)


@pytest.mark.parametrize("kind", ["gaussian_noise", "shot_noise", "impulse_noise"])
def test_noise_differs_by_seed_kind_and_severity(kind: str, picture: Image.Image) -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    residues = {
        (seed, severity): np.sign(pixels(image_shift(grey, kind, severity, seed=seed)) - 128).tobytes()
        for seed in (0, 1)
        for severity in (4, 5)
    }
    assert len(set(residues.values())) == 4


# Grey 128 is 0.502; at these severities fewer than 1 value in 100 is clipped.
@pytest.mark.parametrize(
    ("kind", "severity", "std"),
    [
        ("gaussian_noise", 1, 0.08),
        ("gaussian_noise", 3, 0.18),
        ("shot_noise", 1, (0.502 / 60) ** 0.5),
        ("shot_noise", 3, (0.502 / 12) ** 0.5),
    ],
)
def test_noise_has_the_stated_deviation(kind: str, severity: int, std: float) -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noise = pixels(image_shift(grey, kind, severity, seed=0)) / 255
    assert noise.std() == pytest.approx(std, rel=0.02)
    assert noise.mean() == pytest.approx(0.502, abs=0.003)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02


def test_impulse_noise_strikes_the_stated_share() -> None:
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noise = pixels(image_shift(grey, "impulse_noise", 5, seed=0))
    assert set(np.unique(noise)) == {0, 128, 255}
    assert np.mean(noise == 0) == pytest.approx(0.135, abs=0.005)
    assert np.mean(noise == 255) == pytest.approx(0.135, abs=0.005)


def test_gaussian_blur_has_the_stated_sigma() -> None:
    point = Image.new("RGB", (41, 41))
    point.putpixel((20, 20), (255, 255, 255))
    spread = pixels(image_shift(point, "gaussian_blur", 3, seed=0))[..., 0]
    offsets = np.arange(41) - 20
    variance = (spread.sum(axis=0) * offsets**2).sum() / spread.sum()
    assert variance == pytest.approx(9, rel=0.15)


def test_contrast_keeps_each_channels_mean(picture: Image.Image) -> None:
    shifted = pixels(image_shift(picture, "contrast", 1, seed=0))
    assert shifted.mean(axis=(0, 1)) == pytest.approx(pixels(picture).mean(axis=(0, 1)), abs=0.5)
    assert shifted.std(axis=(0, 1)) == pytest.approx(0.4 * pixels(picture).std(axis=(0, 1)), rel=0.03)


@pytest.mark.parametrize(
    ("before", "after"),
    [((100, 50, 0), (151, 76, 0)), ((250, 125, 0), (255, 128, 0)), ((0, 0, 0), (51, 51, 51))],
)
def test_brightness_raises_v_and_keeps_hue_and_saturation(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    shifted = image_shift(Image.new("RGB", (1, 1), before), "brightness", 2, seed=0)
    assert shifted.getpixel((0, 0)) == pytest.approx(after, abs=1)


def test_pixelate_averages_and_repeats() -> None:
    halves = Image.fromarray(np.repeat(np.array([[[0] * 3, [200] * 3]], np.uint8), 4, axis=0).repeat(4, 1))
    assert np.unique(pixels(image_shift(halves, "pixelate", 2, seed=0))).tolist() == [0, 200]
    stripes = Image.fromarray(np.tile(np.array([[[0] * 3, [200] * 3]], np.uint8), (8, 4, 1)))
    assert np.unique(pixels(image_shift(stripes, "pixelate", 2, seed=0))).tolist() == [100]


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [
        ("gausian_noise", 1, r"kind is 'gausian_noise'; .*gaussian_noise"),
        ("fog machine", 1, r"kind is 'fog machine'; .*jpeg_compression"),
        ("contrast", 0, "severity is 0; it must be an integer from 1 to 5"),
        ("contrast", 6, "severity is 6; it must be an integer from 1 to 5"),
        ("contrast", 2.5, "severity is 2.5; it must be an integer from 1 to 5"),
    ],
)
def test_refuses_what_there_is_not(kind: str, severity: int, message: str, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        image_shift(picture, kind, severity, seed=0)
    assert "\n" not in str(caught.value)
