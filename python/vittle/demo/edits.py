"""Edited pairs of digit scenes, exact and offline, and questions about two scenes.

A cell of a scene is an object: a digit's mask is its ink, an empty cell's the whole cell. Edits change the scene and
draw it anew, with scans of the picture's own split alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from vittle.demo.scenes import (
    CELLS,
    HALF,
    PAPER,
    Placed,
    Question,
    Scene,
    Split,
    caption,
    draw,
    render,
    sample_placed,
    sample_scene,
    write_records,
)
from vittle.discriminative import Attend, Edited, Kind, Object, Picture, make_edits, make_pairs
from vittle.discriminative.pairs import PROMPT

WORDS = tuple("difference between two images and now In which image first second both in together".split())
"""Those of the texts here that `checkpoint.WORDS` lacks."""

COMPARISONS = ("spot_the_difference", "which_image", "which_digit", "total")


@dataclass(frozen=True, eq=False, kw_only=True)
class ScenePicture(Picture):
    """A scene as a picture; its objects are the four cells, in order."""

    scene: Scene
    split: Split


@dataclass(frozen=True, eq=False)
class EditedScene(Edited):
    """The scene after the edit, too."""

    scene: Scene


def write_scene_pairs(folder: str | Path, *, split: Split, count: int, seed: int, attend: Attend | None = None) -> Path:
    """Edits what a model ignores in `count` scenes, twice each; without `attend`, what chance ignores."""
    return make_pairs(folder, pictures(split, count, seed), edit, describe, attend=attend, seed=seed)


def pictures(split: Split, count: int, seed: int) -> Iterator[ScenePicture]:
    """Scenes with captions in any wording."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        scene = sample_scene(rng, split)
        yield picture(f"{split}-{index:05}", scene, split, caption(scene, rng))


def picture(id: str, scene: Scene, split: Split, caption: str | None = None) -> ScenePicture:
    """A scene with what may be edited: a scene keeps a digit or more, and two like digits are not swapped."""
    placed = {p.cell: p for p in scene.placed}
    kinds: tuple[Kind, ...] = ("modify",)
    if len(scene.placed) > 1:
        kinds += ("delete",)
    if len(set(scene.digits)) > 1:
        kinds += ("swap",)
    objects = tuple(
        Object(name, _ink(placed[cell]), kinds) if cell in placed else Object(name, _cell(cell), ("add",))
        for cell, name in enumerate(scene.contents)
    )
    return ScenePicture(id, render(scene), objects, caption, scene=scene, split=split)


def edit(picture: ScenePicture, chosen: int, kind: Kind, rng: np.random.Generator) -> EditedScene:
    """Another digit in the box, two digits in each other's, none, or one where none was."""
    placed = {p.cell: p for p in picture.scene.placed}
    if kind == "modify":
        while (other := sample_placed(rng, picture.split, chosen)).digit == placed[chosen].digit:
            pass
        placed[chosen] = _with_scan(placed[chosen], other)
    elif kind == "swap":
        old = placed[chosen]
        others = [p for p in placed.values() if p.digit != old.digit]
        other = others[rng.integers(len(others))]
        placed[chosen], placed[other.cell] = _with_scan(old, other), _with_scan(other, old)
    elif kind == "delete":
        del placed[chosen]
    else:
        placed[chosen] = sample_placed(rng, picture.split, chosen)
    scene = Scene(tuple(placed[cell] for cell in sorted(placed)))
    return EditedScene(render(scene), scene)


def describe(picture: ScenePicture, chosen: int, kind: Kind, edited: EditedScene) -> str:
    """The difference of the two scenes, whatever the edit."""
    return difference(picture.scene, edited.scene)


def difference(before: Scene, after: Scene) -> str:
    """Of each cell that differs, what it showed and shows: `The top left shows 3 and now nothing. ...`"""
    cells = zip(CELLS, before.contents, after.contents, strict=True)
    return " ".join(f"The {cell} shows {old} and now {new}." for cell, old, new in cells if old != new)


def comparisons(first: Scene, second: Scene) -> list[Question]:
    """Every question that may be asked of two scenes, with its answer, but for their difference."""
    scenes = {"first": first, "second": second}
    holders = {digit: [name for name, scene in scenes.items() if digit in scene.digits] for digit in range(10)}
    return [
        *(
            Question("which_image", f"In which image is the {digit}?", "both" if len(names) == 2 else names[0])
            for digit, names in holders.items()
            if names
        ),
        *(
            Question("which_digit", f"Which digit is at the {CELLS[p.cell]} of the {name} image?", str(p.digit))
            for name, scene in scenes.items()
            for p in scene.placed
        ),
        Question(
            "total", "How many digits are in the two images together?", str(len(first.placed) + len(second.placed))
        ),
    ]


def write_questions(folder: str | Path, *, split: Split, count: int, seed: int) -> Path:
    """Write `<folder>/comparisons.json`, `count` questions of two scenes each, and their images; return the JSON.

    The kinds come in turn. The scenes of `spot_the_difference` are a scene and its edit, those of the rest two scenes.
    """
    rng = np.random.default_rng(seed)
    return write_records(
        folder, "comparisons", (_asked(COMPARISONS[index % len(COMPARISONS)], split, rng) for index in range(count))
    )


def _asked(kind: str, split: Split, rng: np.random.Generator) -> tuple[list[Image.Image], Question]:
    first = sample_scene(rng, split)
    if kind == "spot_the_difference":
        original = picture("", first, split)
        _, _, edited = next(make_edits(original, rng.permutation(4).tolist(), edit, 1, rng))
        return [original.image, edited.image], Question(kind, PROMPT, difference(first, edited.scene))
    second = sample_scene(rng, split)
    asked = [question for question in comparisons(first, second) if question.kind == kind]
    return [render(first), render(second)], draw(asked, rng)


def _with_scan(box: Placed, scan: Placed) -> Placed:
    return replace(box, scan=scan.scan, digit=scan.digit)


def _ink(placed: Placed) -> np.ndarray:
    return (np.asarray(render(Scene((placed,)))) != PAPER).any(axis=-1)


def _cell(cell: int) -> np.ndarray:
    mask = np.zeros((2 * HALF, 2 * HALF), dtype=bool)
    mask[cell // 2 * HALF :, cell % 2 * HALF :][:HALF, :HALF] = True
    return mask
