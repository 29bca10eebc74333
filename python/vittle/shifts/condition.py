"""Under what an evaluation asks its questions: a shift of the images, one of the texts, both, or none."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from PIL import Image

from vittle.errors import UserError
from vittle.shifts.image import IMAGE_SHIFTS, SEVERITIES, image_shift
from vittle.shifts.text import SYNONYM_SHIFTS, TEXT_SEVERITIES, TEXT_SHIFTS, text_shift
from vittle.shifts.translation import must_be_plain

TRANSLATION = "translation"
"""The kind of the sentence-level shifts; a language stands where others have a severity."""

Translator = Callable[[str, str], str]
"""The text of a sample, by its id, in a language."""


class Shift(NamedTuple):
    """A kind and how hard it is: a severity, or the language of a translation."""

    kind: str
    severity: int | str

    @property
    def is_of_images(self) -> bool:
        """Whether it changes images rather than text."""
        return self.kind in IMAGE_SHIFTS

    def __str__(self) -> str:
        """As the user writes it."""
        return f"{self.kind}:{self.severity}"


@dataclass(frozen=True)
class Condition:
    """An image shift, a text shift, both or neither."""

    image: Shift | None = None
    text: Shift | None = None

    @property
    def name(self) -> str:
        """As the user writes it: `clean`, `frost:3`, `keyboard:2`, `frost:3+keyboard:2`."""
        return "+".join(map(str, filter(None, (self.image, self.text)))) or "clean"

    @property
    def file_name(self) -> str:
        """The name, for files on any system."""
        return self.name.replace(":", "-")

    @property
    def group(self) -> str:
        """clean, image, text or joint."""
        if self.image and self.text:
            return "joint"
        return "image" if self.image else "text" if self.text else "clean"

    def images(self, images: Iterable[Image.Image], id: str, seed: int) -> list[Image.Image]:
        """The images of the sample with this id as the model sees them."""
        if self.image is None:
            return list(images)
        kind, severity = self.image
        assert isinstance(severity, int)
        return [
            image_shift(image, kind, severity, seed=sample_seed(seed, f"{id}\0{number}"))
            for number, image in enumerate(images)
        ]

    def question(self, text: str, id: str, seed: int, translator: Translator | None = None) -> str:
        """The text of the sample with this id as the model reads it."""
        if self.text is None:
            return text
        kind, severity = self.text
        if isinstance(severity, str):
            assert translator is not None
            return translator(id, severity)
        return text_shift(text, kind, severity, seed=sample_seed(seed, id))


CLEAN = Condition()


def sample_seed(seed: int, id: str) -> int:
    """What a sample's noise depends on: neither on its place among the others nor on who computes it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{id}".encode(), digest_size=8).digest())


IMAGES_OF_PRESET = tuple(
    Shift(kind, 3)
    for kind in (
        "gaussian_noise", "shot_noise", "defocus_blur", "zoom_blur", "frost", "fog", "contrast", "pixelate",
        "jpeg_compression",
    )
)  # fmt: skip
"""Of Vittle's 9 + 9 + 9: noise, blur, weather and digital, all at the middle severity."""

TEXTS_OF_PRESET = tuple(Shift(kind, 4) for kind in ("keyboard", "ocr", "substitute", "delete", "rs", "rd"))
"""The six on characters and words, at the middle severity; three translations follow, or else the three below."""

TEXTS_WITHOUT_TRANSLATIONS = tuple(Shift(kind, 4) for kind in ("insert", "swap", "ip"))


def vittle_preset(languages: Iterable[str] = ()) -> list[Condition]:
    """Nine image shifts, nine text shifts, and the pairs of the two lists.

    Vittle's paper has 27 such conditions and does not say which: nine image shifts and six on characters or words, of
    MM_Robustness, and three translations. These are our choice. With fewer than three languages three more
    shifts on characters and words stand for the translations.
    """
    translations = tuple(Shift(TRANSLATION, language) for language in list(languages)[:3])
    if len(translations) < 3:
        translations = TEXTS_WITHOUT_TRANSLATIONS
    images, texts = IMAGES_OF_PRESET, TEXTS_OF_PRESET + translations
    pairs = zip(images, texts, strict=True)
    return [*(Condition(i) for i in images), *(Condition(text=t) for t in texts), *(Condition(*pair) for pair in pairs)]


def parse_conditions(specs: Iterable[str], languages: Iterable[str] = ()) -> list[Condition]:
    """The conditions that a user asks for, the clean one first, each once.

    `frost:3` is one severity, `frost:1-5` several, `frost` all; `frost:3+keyboard:2` is joint (of several severities,
    every pair); `translation:German` and `translation` are those of a file; `images` and `texts` are all kinds at all
    severities; `vittle` is :func:`vittle_preset`.

    Raises:
        UserError: a spec names no shift, or no severity of it; or a language's name is none.
    """
    languages = list(languages)
    for language in languages:
        must_be_plain(language, "the language")
    found = {CLEAN: None}
    for spec in specs:
        found |= dict.fromkeys(_parse(spec, languages))
    return list(found)


def _parse(spec: str, languages: list[str]) -> Iterator[Condition]:
    presets: dict[str, Callable[[], Iterable[Condition]]] = {
        "clean": lambda: [CLEAN],
        "vittle": partial(vittle_preset, languages),
        "images": lambda: (Condition(Shift(kind, each)) for kind in IMAGE_SHIFTS for each in SEVERITIES),
        "texts": lambda: (Condition(text=Shift(kind, each)) for kind in TEXT_SHIFTS for each in TEXT_SEVERITIES),
    }
    if spec in presets:
        yield from presets[spec]()
        return
    parts = [_shifts(part, spec, languages, [*presets]) for part in spec.split("+")]
    if len(parts) == 1:
        yield from (Condition(each) if each.is_of_images else Condition(text=each) for each in parts[0])
        return
    parts.sort(key=lambda shifts: not shifts[0].is_of_images)
    if len(parts) != 2 or not parts[0][0].is_of_images or parts[1][0].is_of_images:
        raise UserError(f"shift is {spec!r}; a joint one must be of one image shift and one text shift")
    yield from (Condition(image, text) for image in parts[0] for text in parts[1])


def _shifts(part: str, spec: str, languages: list[str], presets: list[str]) -> list[Shift]:
    """The shifts that one side of a + stands for."""
    kind, _, severity = part.partition(":")
    if kind == TRANSLATION:
        if not languages:
            raise UserError(f"shift is {spec!r}; needs --translations, a file with texts in other languages")
        if severity and severity not in languages:
            raise UserError(f"shift is {spec!r}; the language must be one of the file's: {', '.join(languages)}")
        return [Shift(kind, language) for language in ([severity] if severity else languages)]
    kinds = [*IMAGE_SHIFTS, *TEXT_SHIFTS, *SYNONYM_SHIFTS]
    if kind not in kinds:
        near = difflib.get_close_matches(kind, [*kinds, TRANSLATION, *presets])
        choices = f"near it: {', '.join(near)}" if near else f"one of {', '.join([*kinds, TRANSLATION, *presets])}"
        raise UserError(f"shift is {spec!r}, and {kind!r} is no kind of shift; {choices}")
    allowed = SEVERITIES if kind in IMAGE_SHIFTS else TEXT_SEVERITIES
    if not severity:
        return [Shift(kind, each) for each in allowed]
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", severity):
        first, last = int(match[1]), int(match[2] or match[1])
        if first in allowed and last in allowed and first <= last:
            return [Shift(kind, each) for each in range(first, last + 1)]
    raise UserError(f"shift is {spec!r}; its severity must be in {allowed[0]} to {allowed[-1]}, or such as 1-3")
