"""Scenes of one to four handwritten digits, with captions and questions, in LLaVA's JSON format.

The digits are the 1,797 scans of 8x8 pixels that scikit-learn ships. A scene is a 64x64 page of four cells in
two rows; each cell is empty or holds one scan, enlarged and placed at random within it. `split_scans` parts the
scans once and for all: what is drawn for training never shows a scan that is drawn for evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from vittle.data.llava import MARKER
from vittle.files import write_json

Split = Literal["train", "held_out"]
Kind = Literal["which", "count", "presence", "sum"]

SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)
CELLS = ("top left", "top right", "bottom left", "bottom right")

CANVAS = 64  # pixels a side
HALF = CANVAS // 2  # a cell's
SIDES = range(22, 29)  # pixels a side of a placed scan
PAPER = (236, 229, 212)
INK = (30, 34, 66)
EMPTY = "nothing"  # what an empty cell shows

CAPTION_PROMPT = "Describe the scene."


@dataclass(frozen=True)
class Placed:
    """One scan on the page: its index in the data set, its digit, its cell and its box in pixels."""

    scan: int
    digit: int
    cell: int
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """One to four placed scans, at most one in a cell, in reading order."""

    placed: tuple[Placed, ...]

    @property
    def digits(self) -> tuple[int, ...]:
        return tuple(p.digit for p in self.placed)

    @property
    def contents(self) -> tuple[str, ...]:
        """What each of the four cells shows, in words."""
        shown = {p.cell: str(p.digit) for p in self.placed}
        return tuple(shown.get(cell, EMPTY) for cell in range(4))


@dataclass(frozen=True)
class Question:
    """What is asked or told of images; without a kind where only one thing is."""

    kind: str
    text: str
    answer: str


@cache
def _scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ink of every scan, (1797, 8, 8) in [0, 1], and its digit, (1797,)."""
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


@cache
def split_scans() -> dict[Split, tuple[int, ...]]:
    """The fixed split of the scans, a quarter of every digit held out: 1,350 indices and 447.

    The data set does not name its writers, so one writer's hand may be on both sides; no scan is.
    """
    _, digits = _scans()
    rng = np.random.default_rng(0)
    held_out: list[int] = []
    for digit in range(10):
        scans = rng.permutation(np.flatnonzero(digits == digit))
        held_out += scans[: round(len(scans) / 4)].tolist()
    train = sorted(set(range(len(digits))) - set(held_out))
    return {"train": tuple(train), "held_out": tuple(sorted(held_out))}


def sample_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A scene of one to four scans of `split`, each number of digits as likely as the others."""
    cells = sorted(rng.permutation(4)[: rng.integers(1, 5)].tolist())
    return Scene(tuple(sample_placed(rng, split, cell) for cell in cells))


def sample_placed(rng: np.random.Generator, split: Split, cell: int) -> Placed:
    """A scan of `split`, of random size and place in the cell."""
    _, digits = _scans()
    scan = int(rng.choice(split_scans()[split]))
    side = int(rng.choice(SIDES))
    x, y = rng.integers(0, HALF - side, size=2, endpoint=True).tolist()
    return Placed(scan, int(digits[scan]), cell, cell % 2 * HALF + x, cell // 2 * HALF + y, side)


def render(scene: Scene) -> Image.Image:
    """The page as a 64x64 RGB image: dark blue ink on cream paper."""
    ink, _ = _scans()
    page = Image.new("RGB", (CANVAS, CANVAS), PAPER)
    for p in scene.placed:
        mask = Image.fromarray((ink[p.scan] * 255).astype(np.uint8))
        page.paste(INK, (p.left, p.top), mask.resize((p.side, p.side), Image.Resampling.BICUBIC))
    return page


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What each cell holds: `The top left shows 3. The top right shows nothing. ...`

    With `rng` the order of the cells is drawn, and for each cell which of three sentences stands for it: the one
    above; the digit's own, `The 3 is top left.`; or one of a digit that the scene lacks, `The 5 is not here.`
    """
    contents = scene.contents
    absent = [str(digit) for digit in range(10) if digit not in scene.digits]
    sentences = []
    for cell in range(4) if rng is None else rng.permutation(4).tolist():
        wording = 0 if rng is None else rng.integers(3)
        if wording == 1 and contents[cell] != EMPTY:
            sentences.append(f"The {contents[cell]} is {CELLS[cell]}.")
        elif wording == 2 and rng is not None:
            sentences.append(f"The {rng.choice(absent)} is not here.")
        else:
            sentences.append(f"The {CELLS[cell]} shows {contents[cell]}.")
    return " ".join(sentences)


def questions(scene: Scene) -> list[Question]:
    """Every question that may be asked of `scene`, with its answer."""
    digits = scene.digits
    return [
        *(Question("which", f"Which digit is at the {CELLS[p.cell]}?", str(p.digit)) for p in scene.placed),
        *(Question("presence", f"Is there a {d}?", "yes" if d in digits else "no") for d in range(10)),
        Question("count", "How many digits are there?", str(len(digits))),
        Question("sum", "What is the sum of the digits?", str(sum(digits))),
    ]


def ask(scene: Scene, kind: Kind, rng: np.random.Generator) -> Question:
    """One question of `kind`."""
    return draw([q for q in questions(scene) if q.kind == kind], rng)


def draw(asked: Sequence[Question], rng: np.random.Generator) -> Question:
    """One of them: the answer is drawn first, so that yes and no come equally often."""
    answer = rng.choice(sorted({q.answer for q in asked}))
    choices = [q for q in asked if q.answer == answer]
    return choices[rng.integers(len(choices))]


def write_dataset(
    folder: str | Path,
    *,
    split: Split,
    count: int,
    seed: int,
    kind: Literal["questions", "captions"] = "questions",
) -> Path:
    """Write `count` scenes of `split` as `<folder>/<kind>.json` and `<folder>/images/*.png`; return the JSON.

    Each record is one conversation about one scene; its image path starts from the `images` folder. Questions
    take the kinds in turn and carry theirs under the key `kind`. The JSON appears only when all is written.
    """
    rng = np.random.default_rng(seed)

    def conversations() -> Iterator[tuple[list[Image.Image], Question]]:
        for index in range(count):
            scene = sample_scene(rng, split)
            if kind == "captions":
                yield [render(scene)], Question("", CAPTION_PROMPT, caption(scene, rng))
            else:
                yield [render(scene)], ask(scene, KINDS[index % len(KINDS)], rng)

    return write_records(folder, kind, conversations())


def write_records(
    folder: str | Path, name: str, conversations: Iterable[tuple[Sequence[Image.Image], Question]]
) -> Path:
    """Write `<folder>/<name>.json` and `<folder>/images/*.png`; return the JSON, which appears when all is written."""
    path = Path(folder) / f"{name}.json"
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    records = []
    for index, (pages, question) in enumerate(conversations):
        id = f"{name}-{index:05}"
        files = [f"{id}.png"] if len(pages) == 1 else [f"{id}-{n}.png" for n in range(1, len(pages) + 1)]
        for page, file in zip(pages, files, strict=True):
            page.save(images / file)
        turns = [
            {"from": "human", "value": f"{MARKER}\n" * len(pages) + question.text},
            {"from": "gpt", "value": question.answer},
        ]
        image = files[0] if len(files) == 1 else files
        kind = {"kind": question.kind} if question.kind else {}
        records.append({"id": id, "image": image, "conversations": turns, **kind})
    write_json(path, records)
    return path
