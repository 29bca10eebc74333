"""Image shifts: what each kind does, its determinism, its strength, the images it takes and its refusals."""

from __future__ import annotations

import io
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from vittle.shifts.image import IMAGE_SHIFTS, SEVERITIES, disc, image_shift, streak
from vittle.shifts.textures import frost, plasma, shuffle, waves

RANDOM = [
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform",
]  # fmt: skip
WEATHER = ["snow", "frost", "fog"]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A pagoda under a bright sky, 210x140."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((210, 140))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def noisy(size: tuple[int, int]) -> Image.Image:
    """Independent values from 60 to 190."""
    values = np.random.default_rng(0).integers(60, 190, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def grey(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))


def error(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.mean((pixels(one) - pixels(other)) ** 2)))


def error_of_edges(one: Image.Image, other: Image.Image) -> float:
    """Of the differences between neighbours: what a veil hides or adds, however bright it is."""
    difference = pixels(one) - pixels(other)
    return float(np.sqrt(sum(np.mean(np.diff(difference, axis=axis) ** 2) for axis in (0, 1))))


def random_state() -> str:
    state: Any = np.random.get_state()
    return f"{state[1].tolist()} {state[2]} {random.getstate()}"


def test_there_are_sixteen() -> None:
    assert set(IMAGE_SHIFTS) == set(
        "gaussian_noise shot_noise impulse_noise speckle_noise defocus_blur glass_blur motion_blur zoom_blur "
        "snow frost fog brightness contrast pixelate elastic_transform jpeg_compression".split()
    )


PUBLISHED = """
gaussian_noise .08 .12 .18 .26 .38
shot_noise 60 25 12 5 3
impulse_noise .03 .06 .09 .17 .27
speckle_noise .15 .2 .35 .45 .6
defocus_blur 3,.1 4,.5 6,.5 8,.5 10,.5
glass_blur .7,1,2 .9,2,1 1,2,3 1.1,3,2 1.5,4,2
motion_blur 10,3 15,5 15,8 15,12 20,15
zoom_blur 1.11,.01 1.16,.01 1.21,.02 1.26,.02 1.33,.03
snow .1,.3,3,.5,10,4,.8 .2,.3,2,.5,12,4,.7 .55,.3,4,.9,12,8,.7 .55,.3,4.5,.85,12,8,.65 .55,.3,2.5,.85,12,12,.55
frost 1,.4 .8,.6 .7,.7 .65,.7 .6,.75
fog 1.5,2 2,2 2.5,1.7 2.5,1.5 3,1.4
brightness .1 .2 .3 .4 .5
contrast .4 .3 .2 .1 .05
pixelate .6 .5 .4 .3 .25
elastic_transform 2,.7,.1 2,.08,.2 .05,.01,.02 .07,.01,.02 .12,.01,.02
jpeg_compression 25 18 15 10 7
"""
"""MM_Robustness's constants, severities 1 to 5; elastic_transform's are in units of 244 pixels."""


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines())
def test_the_constants_are_the_published_ones(line: str) -> None:
    kind, *severities = line.split()
    published = [[float(number) for number in severity.split(",")] for severity in severities]
    _, constants = IMAGE_SHIFTS[kind]
    unit = 244 if kind == "elastic_transform" else 1
    assert [list(at) for at in zip(*constants.values(), strict=True)] == [
        pytest.approx([unit * number for number in at], rel=1e-12) for at in published
    ]


@pytest.mark.parametrize("kind", IMAGE_SHIFTS)
class TestEveryKind:
    @pytest.mark.parametrize("seed", [3, 4])
    def test_is_harsher_with_severity(self, kind: str, seed: int, photo: Image.Image) -> None:
        """Frost and fog, whose constants darken and thicken at once, by the edges; elastic_transform is not, as known.

        Every severity of it bends the image all the same.
        """
        measure = error_of_edges if kind in ("frost", "fog") else error
        errors = [measure(photo, image_shift(photo, kind, severity, seed=seed)) for severity in SEVERITIES]
        assert min(errors) > 1
        assert (errors == sorted(set(errors))) != (kind == "elastic_transform")

    def test_depends_on_its_arguments_alone(self, kind: str, photo: Image.Image) -> None:
        before, state = photo.tobytes(), random_state()
        cv2.setRNGSeed(7)
        expected = cv2.randu(np.zeros(4), 0, 1).tolist()
        cv2.setRNGSeed(7)
        first = image_shift(photo, kind, 3, seed=5).tobytes()
        assert cv2.randu(np.zeros(4), 0, 1).tolist() == expected
        assert (photo.tobytes(), random_state()) == (before, state)
        np.random.seed(1)
        random.seed(1)
        image_shift(photo, "snow", 2, seed=6)
        assert first == image_shift(photo, kind, 3, seed=5).tobytes()

    def test_is_the_same_for_any_number_of_threads(self, kind: str, photo: Image.Image) -> None:
        threads = cv2.getNumThreads()
        large = photo.resize((641, 480))
        shifted = set()
        try:
            for count in (1, 2, 4):
                cv2.setNumThreads(count)
                shifted.add(image_shift(large, kind, 4, seed=2).tobytes())
        finally:
            cv2.setNumThreads(threads)
        with ThreadPoolExecutor(3) as pool:
            shifted |= set(pool.map(lambda _: image_shift(large, kind, 4, seed=2).tobytes(), range(3)))
        assert len(shifted) == 1

    def test_is_random_by_its_seed_or_not_at_all(self, kind: str, photo: Image.Image) -> None:
        seeds = (0, 1, -1, 2**32, 2**32 + 1, 10**40, -(10**40))
        shifted = {image_shift(photo, kind, 5, seed=seed).tobytes() for seed in seeds}
        assert len(shifted) == (len(seeds) if kind in RANDOM else 1)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"])
    def test_takes_any_mode(self, kind: str, mode: str) -> None:
        shifted = image_shift(Image.new(mode, (7, 5)), kind, 5, seed=0)
        assert (shifted.mode, shifted.size) == ("RGB", (7, 5))

    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_takes_any_size(self, kind: str, severity: int) -> None:
        for size in [(1, 1), (1, 3), (2, 1), (5, 3), (300, 2), (33, 64)]:
            shifted = image_shift(noisy(size), kind, severity, seed=severity)
            assert (shifted.mode, shifted.size) == ("RGB", size)

    def test_keeps_the_channels_in_order(self, kind: str) -> None:
        """A reddish picture stays reddish."""
        red, green, blue = pixels(image_shift(Image.new("RGB", (64, 48), (190, 90, 40)), kind, 2, seed=0)).mean((0, 1))
        assert red > green + 10 > blue + 20


class TestNoise:
    # Grey 128 is 0.502; at these severities fewer than 1 value in 100 is clipped.
    @pytest.mark.parametrize(
        ("kind", "severity", "std"),
        [
            ("gaussian_noise", 1, 0.08),
            ("gaussian_noise", 3, 0.18),
            ("shot_noise", 1, (0.502 / 60) ** 0.5),
            ("shot_noise", 3, (0.502 / 12) ** 0.5),
            ("speckle_noise", 1, 0.502 * 0.15),
            ("speckle_noise", 3, 0.502 * 0.35),
        ],
    )
    def test_has_the_stated_deviation(self, kind: str, severity: int, std: float) -> None:
        noise = pixels(image_shift(grey((200, 200)), kind, severity, seed=0)) / 255
        assert noise.std() == pytest.approx(std, rel=0.02)
        assert noise.mean() == pytest.approx(0.502, abs=0.003)
        assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02

    def test_of_impulses_strikes_the_stated_share(self) -> None:
        noise = pixels(image_shift(grey((200, 200)), "impulse_noise", 5, seed=0))
        assert set(np.unique(noise)) == {0, 128, 255}
        assert np.mean(noise == 0) == pytest.approx(0.135, abs=0.005)
        assert np.mean(noise == 255) == pytest.approx(0.135, abs=0.005)

    def test_of_speckles_spares_black(self) -> None:
        assert not pixels(image_shift(Image.new("RGB", (20, 20)), "speckle_noise", 5, seed=0)).any()


class TestBlur:
    @pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
    @pytest.mark.parametrize("severity", SEVERITIES)
    def test_keeps_a_flat_image(self, kind: str, severity: int) -> None:
        flat = Image.new("RGB", (50, 31), (200, 100, 7))
        assert image_shift(flat, kind, severity, seed=severity).tobytes() == flat.tobytes()

    def test_of_defocus_is_a_disc(self) -> None:
        sharp = disc(10, 0.1)
        y, x = np.mgrid[-12:13, -12:13]
        assert sharp.sum() == pytest.approx(1)
        assert np.array_equal(sharp > 1e-6, x**2 + y**2 <= 100)
        soft = disc(10, 0.5)
        assert soft.sum() == pytest.approx(1)
        assert len(np.unique(soft.round(6))) > len(np.unique(sharp.round(6))) == 2

    @pytest.mark.parametrize("degrees", [-135, -90, -45, 0, 30, 45])
    def test_of_motion_is_half_a_gaussian_along_a_line(self, degrees: float) -> None:
        kernel, (right, down) = streak(15, 8, degrees)
        assert kernel.sum() == pytest.approx(1)
        y, x = np.nonzero(kernel)
        steps = (x - right) + 1j * (y - down)
        along = steps * np.exp(-1j * np.deg2rad(degrees))
        assert np.abs(along.imag).max() < 0.75
        assert along.real.min() >= 0
        assert along.real.max() == pytest.approx(30, abs=0.75)
        second_moment = (kernel[y, x] * along.real**2).sum()
        assert second_moment == pytest.approx(64, rel=0.1)

    def test_of_motion_is_within_45_degrees(self) -> None:
        """The longer axis of a blurred point, over many seeds."""
        point = Image.new("RGB", (81, 81))
        point.putpixel((40, 40), (255, 255, 255))
        y, x = np.mgrid[:81, :81]
        angles = []
        for seed in range(30):
            covariance = np.cov(
                x.flat, y.flat, aweights=pixels(image_shift(point, "motion_blur", 3, seed=seed))[..., 0].flat
            )
            angles.append(np.rad2deg(np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1]) / 2))
        assert -47 < min(angles) < -30
        assert 30 < max(angles) < 47

    def test_of_zoom_is_about_the_centre(self, photo: Image.Image) -> None:
        blurred = pixels(image_shift(photo, "zoom_blur", 3, seed=0))
        assert blurred.mean() == pytest.approx(pixels(photo).mean(), rel=0.1)
        symmetric = noisy((41, 31))
        turned = symmetric.transpose(Image.Transpose.ROTATE_180)
        symmetric = Image.blend(symmetric, turned, 0.5)
        result = pixels(image_shift(symmetric, "zoom_blur", 5, seed=0))
        assert np.abs(result - result[::-1, ::-1]).max() <= 2
        sharpness = np.abs(np.diff(pixels(image_shift(noisy((201, 101)), "zoom_blur", 5, seed=0)), axis=1)).mean(2)
        assert sharpness[45:56, 95:105].mean() > 2 * sharpness[:10, :10].mean()

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (300, 301), (64, 7)])
    def test_of_glass_permutes_pixels(self, height: int, width: int) -> None:
        source = shuffle(height, width, 4, 2, np.random.default_rng(0))
        assert np.array_equal(np.sort(source), np.arange(height * width))

    def test_of_glass_moves_pixels_all_over_a_little(self) -> None:
        height, width = 300, 400
        one = shuffle(height, width, 1, 1, np.random.default_rng(0)).reshape(height, width)
        rows, columns = one // width - np.arange(height)[:, None], one % width - np.arange(width)
        moved = (rows != 0) | (columns != 0)
        for corner in (moved[:40, :40], moved[-40:, :40], moved[:40, -40:], moved[-40:, -40:]):
            assert corner.mean() > 0.7
        assert np.sqrt(np.mean(rows**2)) == pytest.approx(np.sqrt(np.mean(columns**2)), rel=0.15)
        assert 0.7 < np.sqrt(np.mean(rows**2)) < 1.4
        assert abs(rows.mean()) < 0.01


class TestWeather:
    @pytest.mark.parametrize("kind", WEATHER)
    @pytest.mark.parametrize("size", [(1300, 260), (240, 1100)])
    def test_is_everywhere(self, kind: str, size: tuple[int, int]) -> None:
        """Each of 5 x 5 parts has texture of its own, and no two of them the same."""
        weather = pixels(image_shift(Image.new("RGB", size, (90, 90, 90)), kind, 4, seed=1)).mean(axis=2)
        parts = [part for row in np.array_split(weather, 5) for part in np.array_split(row, 5, axis=1)]
        assert min(part.std() for part in parts) > 2
        assert np.mean(np.abs(weather - 90) > 2) > 0.5
        assert len({part.tobytes() for part in parts}) == 25

    def test_of_frost_is_icy(self) -> None:
        ice = frost(200, 300, np.random.default_rng(0))
        assert (ice[..., 2] >= ice[..., 1]).all()
        assert (ice[..., 1] >= ice[..., 0]).all()
        assert ice.min() >= 0
        assert ice.max() <= 1
        assert np.percentile(ice, 5) < 0.2
        assert np.percentile(ice, 98) > 0.75

    def test_of_frost_grows_everywhere(self) -> None:
        """Ferns in every ninth of a large pane, seen at the scale of their barbs; grains alone come to 0.08."""
        ice = frost(900, 1200, np.random.default_rng(0))[..., 0]
        barbs = cv2.GaussianBlur(ice, (0, 0), 2) - cv2.GaussianBlur(ice, (0, 0), 6)
        spread, mean = (
            [reduce(part) for row in np.array_split(field, 3) for part in np.array_split(row, 3, axis=1)]
            for field, reduce in ((barbs, np.std), (ice, np.mean))
        )
        assert min(np.divide(spread, mean)) > 0.11

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (64, 64), (65, 200), (1500, 30)])
    def test_of_fog_is_a_fractal_from_0_to_1(self, height: int, width: int) -> None:
        field = plasma(height, width, 1.5, np.random.default_rng(0))
        assert field.shape == (height, width)
        assert field.min() >= 0
        assert field.max() <= 1

    def test_of_fog_is_rougher_with_less_decay(self) -> None:
        """Pixels four times as far apart differ `decay`^4 times as much, roughly: it is squared at each doubling."""
        roughness = []
        for decay in (1.1, 1.2):
            fields = [plasma(512, 512, decay, np.random.default_rng(seed)) for seed in range(6)]
            near, far = (np.mean([np.abs(f[step:] - f[:-step]).mean() for f in fields]) for step in (4, 16))
            roughness.append(far / near)
        assert roughness[0] == pytest.approx(1.1**4, rel=0.12)
        assert roughness[1] == pytest.approx(1.2**4, rel=0.12)

    def test_of_snow_falls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Along the vertical, give or take 45 degrees."""
        angles = []

        def record(flakes: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
            angles.append(degrees)
            return flakes

        monkeypatch.setattr("vittle.shifts.image.streaked", record)
        for seed in range(40):
            image_shift(grey((8, 8)), "snow", 1, seed=seed)
        assert -135 <= min(angles) < -125
        assert -55 < max(angles) <= -45

    def test_of_snow_whitens(self) -> None:
        snowy = pixels(image_shift(Image.new("RGB", (300, 200), (30, 60, 90)), "snow", 1, seed=0))
        # Where no flake falls: 0.8 of the colour and 0.2 of 1.5 times its grey and a half.
        whitened = 0.8 * np.array([30, 60, 90]) + 0.2 * (1.5 * (0.299 * 30 + 0.587 * 60 + 0.114 * 90) + 127.5)
        assert np.percentile(snowy, 1, axis=(0, 1)) == pytest.approx(whitened, abs=1)
        assert (snowy.max(axis=(0, 1)) > whitened + 40).all()


class TestDigital:
    def test_contrast_keeps_each_channels_mean(self, photo: Image.Image) -> None:
        shifted = pixels(image_shift(photo, "contrast", 1, seed=0))
        assert shifted.mean(axis=(0, 1)) == pytest.approx(pixels(photo).mean(axis=(0, 1)), abs=0.5)
        assert shifted.std(axis=(0, 1)) == pytest.approx(0.4 * pixels(photo).std(axis=(0, 1)), rel=0.03)

    @pytest.mark.parametrize(
        ("before", "after"),
        [((100, 50, 0), (151, 76, 0)), ((250, 125, 0), (255, 128, 0)), ((0, 0, 0), (51, 51, 51))],
    )
    def test_brightness_raises_v_and_keeps_hue_and_saturation(
        self, before: tuple[int, int, int], after: tuple[int, int, int]
    ) -> None:
        shifted = image_shift(Image.new("RGB", (1, 1), before), "brightness", 2, seed=0)
        assert shifted.getpixel((0, 0)) == pytest.approx(after, abs=1)

    def test_pixelate_averages_and_repeats(self) -> None:
        halves = Image.fromarray(np.repeat(np.array([[[0] * 3, [200] * 3]], np.uint8), 4, axis=0).repeat(4, 1))
        assert np.unique(pixels(image_shift(halves, "pixelate", 2, seed=0))).tolist() == [0, 200]
        stripes = Image.fromarray(np.tile(np.array([[[0] * 3, [200] * 3]], np.uint8), (8, 4, 1)))
        assert np.unique(pixels(image_shift(stripes, "pixelate", 2, seed=0))).tolist() == [100]

    def test_pixelate_has_square_blocks_of_their_mean(self) -> None:
        """Of 4 at severity 5, on an image that is not square."""
        image = noisy((48, 20))
        blocks = pixels(image_shift(image, "pixelate", 5, seed=0)).reshape(5, 4, 12, 4, 3)
        assert np.ptp(blocks, axis=(1, 3)).max() == 0
        means = pixels(image).reshape(5, 4, 12, 4, 3).mean(axis=(1, 3))
        assert np.abs(blocks[:, 0, :, 0] - means).max() <= 1

    @pytest.mark.parametrize(("severity", "quality"), [(1, 25), (5, 7)])
    def test_jpeg_is_pillows(self, severity: int, quality: int, photo: Image.Image) -> None:
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=quality)
        shifted = image_shift(photo, "jpeg_compression", severity, seed=0)
        assert shifted.tobytes() == Image.open(buffer).tobytes()

    def test_elastic_transform_is_smooth(self) -> None:
        """A horizontal ramp stays nearly one: its values tell from where each pixel came."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
        came = pixels(image_shift(Image.fromarray(ramp.copy()), "elastic_transform", 5, seed=0))[60:-60, 60:-60, 0]
        steps = np.diff(came, axis=1)
        assert 0 < np.abs(came - np.arange(60, 196)).mean() < 10
        assert steps.mean() == pytest.approx(1, abs=0.1)
        assert np.abs(steps - 1).max() < 6
        assert steps.std() > 0.3

    @pytest.mark.parametrize("sigma", [2.44, 12, 20])
    def test_waves_have_the_deviation_of_blurred_noise(self, sigma: float) -> None:
        """1 / (2 sqrt(pi) sigma) of a uniform's, however coarse the blocks; a sigma off, exp(-1/4) of it is shared."""
        field = waves(1024, 1024, sigma, np.random.default_rng(0))
        assert field.std() == pytest.approx(3**-0.5 / (2 * np.pi**0.5 * sigma), rel=0.06)
        shift = round(sigma)
        shared = np.corrcoef(field[:, shift:].ravel(), field[:, :-shift].ravel())[0, 1]
        assert shared == pytest.approx(np.exp(-((shift / sigma) ** 2) / 4), abs=0.05)


class TestModes:
    def as_read(self, image: Image.Image) -> np.ndarray:
        """An image as the shifts read it: contrast keeps a flat image."""
        return pixels(image_shift(image, "contrast", 1, seed=0))[0, 0]

    @pytest.mark.parametrize(
        ("mode", "value", "level"),
        [
            ("1", 1, 255),
            ("L", 77, 77),
            ("I;16", 257 * 77, 77),
            ("I;16", 77, 0),
            ("I;16B", 257 * 77, 77),
            ("I", 77, 77),
            ("I", 257 * 77, 77),
            ("I", -5, 0),
            ("F", 0.2, 51),
            ("F", 77.0, 77),
            ("F", 257 * 77.0, 77),
            ("F", float("nan"), 0),
        ],
    )
    def test_scale_to_8_bits(self, mode: str, value: float, level: int) -> None:
        assert self.as_read(Image.new(mode, (3, 3), value)).tolist() == [level] * 3

    def test_of_floats_beyond_16_bits_scale_by_the_largest(self) -> None:
        wide = Image.fromarray(np.array([[0, 1e6]], np.float32))
        assert pixels(image_shift(wide, "jpeg_compression", 1, seed=0))[0, :, 0] == pytest.approx([0, 255], abs=12)

    def test_drop_transparency(self) -> None:
        assert self.as_read(Image.new("RGBA", (3, 3), (10, 20, 30, 0))).tolist() == [10, 20, 30]
        palette = Image.new("RGB", (3, 3), (10, 20, 30)).quantize(2)
        palette.info["transparency"] = bytes([0, 255])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.as_read(palette) == pytest.approx([10, 20, 30], abs=4)


@pytest.mark.parametrize(
    ("kind", "severity", "seed", "message"),
    [
        ("gausian_noise", 1, 0, r"kind is 'gausian_noise'; .*gaussian_noise"),
        ("gaussian_blur", 1, 0, r"kind is 'gaussian_blur'; .*glass_blur|defocus_blur"),
        ("smoke machine", 1, 0, f"kind is 'smoke machine'; .*{', '.join(IMAGE_SHIFTS)}"),
        (None, 1, 0, "kind is None; it must be an image shift such as"),
        ("contrast", 0, 0, "severity is 0; it must be an integer from 1 to 5"),
        ("contrast", 6, 0, "severity is 6; it must be an integer from 1 to 5"),
        ("contrast", 2.0, 0, r"severity is 2\.0; it must be an integer from 1 to 5"),
        ("contrast", True, 0, "severity is True; it must be an integer from 1 to 5"),
        ("contrast", "3", 0, "severity is '3'; it must be an integer from 1 to 5"),
        ("contrast", 3, 1.5, r"seed is 1\.5; it must be an integer"),
        ("contrast", 3, None, "seed is None; it must be an integer"),
    ],
)
def test_refuses_what_there_is_not(kind: Any, severity: Any, seed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        image_shift(grey((4, 4)), kind, severity, seed=seed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(0, 4), (40_000, 1)])
def test_refuses_images_that_cannot_be(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^image is {size[0]}x{size[1]} pixels; its sides must be from 1 to 32766"):
        image_shift(Image.new("RGB", size), "zoom_blur", 1, seed=0)


def test_takes_numpys_integers() -> None:
    image = grey((8, 8))
    expected = image_shift(image, "shot_noise", 2, seed=7)
    assert image_shift(image, "shot_noise", np.int64(2), seed=np.int64(7)).tobytes() == expected.tobytes()
