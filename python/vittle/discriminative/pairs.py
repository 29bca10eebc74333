"""Edited pairs in a folder: `pairs.json`, a list of records, and the pictures that they name.

docs/discriminative.md describes the format field by field.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vittle.data.lines import id_of, read_list, text_of
from vittle.data.llava import MARKER, decode, image_file
from vittle.discriminative.significance import unit
from vittle.errors import UserError, shown
from vittle.files import save_json
from vittle.pictures import rgb

Kind = Literal["modify", "swap", "delete", "add"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""VPG-C's four edits (arXiv 2308.04152, section 2.2)."""

PAIRS = "pairs.json"
PROMPT = "What is the difference between the two images?"
CAPTION_PROMPT = "Describe the image."
CAPTIONS_PER_PAIR = 64 / 24
"""VPG-C's batches: 64 captions beside 24 pairs."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What is said of a pair."""

    id: str
    kind: Kind
    object: str
    """What was edited."""
    difference: str
    """What the model is to say of the two pictures."""
    caption: str | None = None
    """Of the original."""
    significance: float | None = None
    """The attention that the object got."""

    @property
    def told(self) -> dict[str, Any]:
        """These fields, by name."""
        return {name: getattr(self, name) for name in _Told.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair(_Told):
    """A picture and its edit.

    Raises:
        UserError: the edited picture or the mask is not of the picture's size, or the mask is not bool or nowhere True.
    """

    image: Image.Image
    edited: Image.Image
    mask: NDArray[np.bool_]
    """(H, W), True inside the object; of an added object, the place it was put in."""
    attention: NDArray[np.float64] | None = None
    """(h, w), any size and scale; from a folder in [0, 1], as 8 bits hold it."""

    def __post_init__(self) -> None:
        place = f"pair {shown(self.id)}"
        _check_sizes(self.image.size, self.edited.size, self.mask.shape[::-1], place)
        if self.mask.dtype != bool or not self.mask.any():
            found = f"{self.mask.dtype}, {'somewhere' if self.mask.any() else 'nowhere'} True"
            raise UserError(f"{place}: `mask` is {found}; must be bool, True inside the object")


@dataclass(frozen=True, kw_only=True)
class StoredPair(_Told):
    """A pair whose pictures are files that exist, within the folder of `pairs.json`."""

    image: Path
    edited: Path
    mask: Path
    attention: Path | None = None

    def load(self) -> Pair:
        """Decodes its pictures, to RGB.

        Raises:
            UserError: one cannot be decoded, or nothing in the mask is white.
        """
        mask = np.asarray(decode(self.mask).convert("L")) > 127
        if not mask.any():
            raise UserError(f"{self.mask} has no white pixel; a mask must be white inside the object")
        attention = None if self.attention is None else np.asarray(decode(self.attention).convert("L")) / 255
        return Pair(**self.told, image=decode(self.image), edited=decode(self.edited), mask=mask, attention=attention)


def write_pairs(folder: str | Path, pairs: Iterable[Pair]) -> Path:
    """Writes pairs as they come, pictures as PNG in RGB; returns `pairs.json`, which appears when all are written.

    Pairs of one and the same picture that come together share its file.

    Raises:
        UserError: the folder holds pairs already or cannot be written, there is no pair, an id stands twice, or a text
            is empty or has an image marker.
    """
    path = Path(folder) / PAIRS
    if path.exists():
        raise UserError(f"{path} exists; name another folder, or remove it first")
    try:
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written: {error.strerror}") from error
    records: dict[str, dict[str, Any]] = {}
    original: Image.Image | None = None
    image = ""
    for index, pair in enumerate(pairs):
        told = _check_told(pair.told, f"pair {shown(pair.id)}")
        if told["id"] in records:
            raise UserError(f"pair {shown(pair.id)} stands twice; ids must differ")
        pictures = {"edited": rgb(pair.edited), "mask": Image.fromarray(pair.mask)}
        if pair.image is not original:
            original, pictures["image"] = pair.image, rgb(pair.image)
        if pair.attention is not None:
            pictures["attention"] = Image.fromarray(np.round(255 * unit(pair.attention)).astype(np.uint8))
        names = {"image": image}
        for name, picture in pictures.items():
            names[name] = f"images/{index:06}-{name}.png"
            try:
                picture.save(path.parent / names[name])
            except OSError as error:
                raise UserError(f"{path.parent / names[name]} cannot be written: {error.strerror}") from error
        image = names["image"]
        said = {name: value for name, value in told.items() if value is not None}
        records[told["id"]] = {"id": told["id"], **names, **said}
    if not records:
        raise UserError(f"there is no pair for {path}; must be at least one")
    save_json(path, list(records.values()))
    return path


def read_pairs(path: str | Path) -> list[StoredPair]:
    """The pairs of a `pairs.json`, validated but for their pixels.

    Raises:
        UserError: the file cannot be read or holds no pair; or a record lacks a field, holds what it must not, repeats
            an id, or names a picture that is missing, outside the file's folder, or of another size than its image.
    """
    path = Path(path)
    folder = path.parent.resolve()
    pairs: dict[str, StoredPair] = {}
    for place, record in read_list(path):
        pair = _read_pair(record, folder, place)
        if pair.id in pairs:
            raise UserError(f"{place}: id {shown(pair.id)} stands twice; ids must differ")
        pairs[pair.id] = pair
    if not pairs:
        raise UserError(f"{path} holds no pair")
    return list(pairs.values())


def to_llava(
    path: str | Path,
    output: str | Path,
    *,
    captions_per_pair: float = CAPTIONS_PER_PAIR,
    prompt: str = PROMPT,
    caption_prompt: str = CAPTION_PROMPT,
    seed: int = 0,
) -> Path:
    """Writes a folder's pairs as LLaVA's JSON, whose image paths start from the folder of `pairs.json`.

    A pair becomes a record of two images, `prompt` and the difference. After them come captions of originals, each as
    often as the others or once more, so that there are `captions_per_pair` for each pair: VPG-C (arXiv 2308.04152,
    section 2.2) trains on both jointly, 24 pairs to 64 captions.

    Args:
        path: `pairs.json`.
        output: the file to write; its path is returned.
        captions_per_pair: 0 for pairs alone.
        prompt: asks for the difference.
        caption_prompt: asks for the caption.
        seed: of the order of the captions, and so of those that come once more.

    Raises:
        UserError: as `read_pairs`, `captions_per_pair` is negative, it asks for captions and no pair has one, or the
            output is `pairs.json` itself or cannot be written.
    """
    if not 0 <= captions_per_pair < math.inf:
        raise UserError(f"captions_per_pair is {captions_per_pair}; must be 0 or more")
    pairs = read_pairs(path)
    folder = Path(path).parent.resolve()
    if Path(output).resolve() == Path(path).resolve():
        raise UserError(f"output is {output}, the pairs themselves; must be another file")

    def record(id: str, images: list[Path], asked: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"{MARKER}\n" * len(images) + asked}, {"from": "gpt", "value": answer}]
        return {"id": id, "image": [image.relative_to(folder).as_posix() for image in images], "conversations": turns}

    records = [record(f"pair-{pair.id}", [pair.image, pair.edited], prompt, pair.difference) for pair in pairs]
    captions = list(dict.fromkeys((pair.image, pair.caption) for pair in pairs if pair.caption is not None))
    count = round(len(pairs) * captions_per_pair)
    if count and not captions:
        raise UserError(f"{path} has no caption; must have some, or captions_per_pair must be 0")
    rng = np.random.default_rng(seed)
    rounds = chain.from_iterable(rng.permutation(len(captions)).tolist() for _ in repeat(None))
    for n, index in enumerate(islice(rounds, count)):
        image, caption = captions[index]
        records.append(record(f"caption-{n}", [image], caption_prompt, caption))
    save_json(Path(output), records)
    return Path(output)


def _read_pair(record: Mapping[str, Any], folder: Path, place: str) -> StoredPair:
    told = _check_told(record, place)
    image, edited, mask = (_file(text_of(record, name, place), folder, place) for name in ("image", "edited", "mask"))
    _check_sizes(_size(image, place), _size(edited, place), _size(mask, place), place)
    has_attention = record.get("attention") is not None
    attention = _file(text_of(record, "attention", place), folder, place) if has_attention else None
    return StoredPair(**told, image=image, edited=edited, mask=mask, attention=attention)


def _check_told(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a record says of a pair, by the fields' names."""
    kind = text_of(record, "kind", place)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS) or KINDS
        raise UserError(f"{place}: `kind` is {shown(kind)}; must be an edit such as {', '.join(near)}")
    score = record.get("significance")
    if score is not None and (isinstance(score, bool) or not (isinstance(score, int | float) and math.isfinite(score))):
        raise UserError(f"{place}: `significance` is {shown(score)}; must be a number")
    return {
        "id": id_of(record, "id", place),
        "kind": kind,
        "object": text_of(record, "object", place),
        "difference": _words(record, "difference", place),
        "caption": None if record.get("caption") is None else _words(record, "caption", place),
        "significance": score,
    }


def _words(record: Mapping[str, Any], name: str, place: str) -> str:
    text = text_of(record, name, place)
    if MARKER in text:
        raise UserError(f"{place}: `{name}` has an {MARKER} marker; must be words alone")
    return text


def _file(name: str, folder: Path, place: str) -> Path:
    try:
        return image_file(name, folder)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _size(file: Path, place: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except Exception as error:  # Pillow's readers raise many types for a broken file
        raise UserError(f"{place}: image {file} cannot be read ({error}); must be an image") from error


def _check_sizes(image: tuple[int, ...], edited: tuple[int, ...], mask: tuple[int, ...], place: str) -> None:
    for name, size in (("edited", edited), ("mask", mask)):
        if size != image:
            raise UserError(f"{place}: `{name}` is of size {size}; must be of its image's, {image}")
