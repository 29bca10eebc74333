"""A page of edited pairs: what the model sees and ignores, what was chosen, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vittle.discriminative.pairs import KINDS, Pair
from vittle.discriminative.significance import interpolated, unit
from vittle.pages import data_uri, write_page

_SIDE = 256
_OUTLINE = (226, 62, 32)


def write_gallery(pairs: Iterable[Pair], path: str | Path, title: str = "Edited pairs") -> None:
    """Writes one page that needs no network, whole or not at all.

    Every picture is within the page: some hundred pairs are enough for one.
    """
    shown = list(pairs)
    kinds = Counter(pair.kind for pair in shown)
    write_page(
        Path(path),
        "gallery.html.j2",
        title=title,
        kinds={kind: kinds[kind] for kind in KINDS},
        pairs=[(pair, _looks(pair)) for pair in shown],
    )


def _looks(pair: Pair) -> dict[str, str]:
    """The pictures of one row by their captions; empty where there is no map."""
    original = _fit(pair.image)
    score = "" if pair.significance is None else f", {pair.significance:.3g}"
    return {
        "original": data_uri(original),
        "attention": "" if pair.attention is None else data_uri(_heated(original, pair.attention)),
        f"chosen: {pair.object}{score}": data_uri(_outlined(original, pair.mask)),
        f"edited: {pair.kind}": data_uri(_fit(pair.edited)),
    }


def _fit(image: Image.Image) -> Image.Image:
    """Small pictures are enlarged pixel by pixel, large ones made small."""
    times = max(1, _SIDE // max(image.size))
    fitted = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    fitted.thumbnail((_SIDE, _SIDE))
    return fitted


def _heated(image: Image.Image, attention: NDArray[Any]) -> Image.Image:
    """The picture in grey under its map in colour, dark at the map's least and bright at its most."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](interpolated(unit(attention), image.size), bytes=True)[..., :3]
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colours), 0.6)


def _outlined(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """The picture faded but for the object, with a line around it."""
    inside = _fit(Image.fromarray(mask).convert("L")).point(lambda value: 255 * (value > 127))
    around = inside.filter(ImageFilter.MaxFilter(7))
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.5)
    faded.paste(_OUTLINE, mask=around)
    faded.paste(image, mask=inside)
    return faded
