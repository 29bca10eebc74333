"""From pictures to edited pairs; who attends, edits and describes is the caller's to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vittle.discriminative.pairs import KINDS, Kind, Pair, write_pairs
from vittle.discriminative.significance import significance
from vittle.errors import UserError


@dataclass(frozen=True, eq=False)
class Object:
    """What may be edited in a picture."""

    name: str
    mask: NDArray[np.bool_]
    """(H, W), True inside."""
    kinds: tuple[Kind, ...]
    """The edits that it admits; VPG-C adds on background only, `("add",)`."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its objects; an editor that must know more takes a subclass."""

    id: str
    image: Image.Image
    objects: tuple[Object, ...]
    caption: str | None = None


@dataclass(frozen=True, eq=False)
class Edited:
    """What an editor returns; a describer that must know more takes a subclass."""

    image: Image.Image


P = TypeVar("P", bound=Picture)
E = TypeVar("E", bound=Edited)

Attend = Callable[[Sequence[Image.Image]], NDArray[Any]]
"""Pictures to a model's attention, (N, h, w), a map a picture: averaged over layers and queries."""
Edit = Callable[[P, int, Kind, np.random.Generator], E | None]
"""A picture, the index of the object chosen and the kind to the edit, or None where it does not come out well."""
Describe = Callable[[P, int, Kind, E], str]
"""What the edit changed, as the model is to say it."""


def make_pairs(
    folder: str | Path,
    pictures: Iterable[P],
    edit: Edit[P, E],
    describe: Describe[P, E],
    *,
    attend: Attend | None = None,
    edits: int = 2,
    batch_size: int = 64,
    seed: int = 0,
) -> Path:
    """Edits what a model ignores in each picture, and writes the pairs; returns `pairs.json`.

    VPG-C (arXiv 2308.04152, section 2.2) makes about 64,000 edits of 30,000 pictures; it says neither how many of a
    picture nor of which kind. Here each edit draws its kind, all as likely, and is made on the most ignored object
    that admits it and is not edited yet. What the editor declines is tried on the next object, then by the next kind.

    Args:
        folder: where `pairs.json` and its images are written.
        pictures: read `batch_size` at a time.
        edit: makes the edit.
        describe: says what it changed.
        attend: the model's attention; without it objects are drawn at random.
        edits: of a picture, at most.
        batch_size: pictures that `attend` sees at once.
        seed: of all that is drawn; what is drawn for a picture depends on its place alone.

    Raises:
        UserError: a map or a mask is not as `significance` takes it, an edit not of its picture's size, or a pair not
            as `write_pairs` takes it.
    """

    def pairs() -> Iterator[Pair]:
        for index, (picture, attention) in enumerate(_attended(pictures, attend, batch_size)):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
            scores, order = None, rng.permutation(len(picture.objects))
            if attention is not None and picture.objects:
                scores = significance(attention, np.stack([each.mask for each in picture.objects]))
                order = np.argsort(scores, kind="stable")
            for n, (chosen, kind, edited) in enumerate(make_edits(picture, order.tolist(), edit, edits, rng)):
                yield Pair(
                    id=f"{picture.id}-{n}",
                    kind=kind,
                    object=picture.objects[chosen].name,
                    difference=describe(picture, chosen, kind, edited),
                    caption=picture.caption,
                    significance=None if scores is None else float(scores[chosen]),
                    image=picture.image,
                    edited=edited.image,
                    mask=picture.objects[chosen].mask,
                    attention=attention,
                )

    return write_pairs(folder, pairs())


def make_edits(
    picture: P, order: Sequence[int], edit: Edit[P, E], count: int, rng: np.random.Generator
) -> Iterator[tuple[int, Kind, E]]:
    """At most `count` edits, each of another object: its index, the kind and the edit.

    Args:
        picture: whose objects are edited, each edit on the original.
        order: indices of objects; the first that admits the kind drawn is taken.
        edit: makes the edit.
        count: of edits.
        rng: draws the kinds, and is the editor's.
    """
    left = list(order)
    for _ in range(count):
        kinds: list[Kind] = rng.permutation(KINDS).tolist()
        tries = ((chosen, kind) for kind in kinds for chosen in left if kind in picture.objects[chosen].kinds)
        made = ((chosen, kind, edit(picture, chosen, kind, rng)) for chosen, kind in tries)
        for chosen, kind, edited in made:
            if edited is not None:
                yield chosen, kind, edited
                left.remove(chosen)
                break


def _attended(pictures: Iterable[P], attend: Attend | None, size: int) -> Iterator[tuple[P, NDArray[Any] | None]]:
    rest = iter(pictures)
    while batch := list(islice(rest, size)):
        maps = [None] * len(batch) if attend is None else attend([picture.image for picture in batch])
        if len(maps) != len(batch):
            raise UserError(f"attend gave {len(maps)} maps of {len(batch)} pictures; must give one of each")
        yield from zip(batch, maps, strict=True)
