"""MME (Fu et al., 2023): two questions an image, one to be answered yes and one no; accuracy and accuracy+."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vittle.errors import UserError, shown
from vittle.tasks.task import Counts, Sample, Task, Values, add, share, with_images

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_IMAGES = (".jpg", ".jpeg", ".png")


class Mme(Task):
    """The score of a category is its accuracy plus its accuracy+, the share of images with both answers right, both in
    percent; perception (ten categories, 2000 at most) and cognition (four, 800) are sums of scores.

    Args:
        data: the benchmark's folder: a folder for each category, with images and, of the same name, text files of
            two lines `question<TAB>Yes`; or with the folders `images` and `questions_answers_YN`.

    Raises:
        UserError: there is no category's folder, a line is malformed, or an image is missing.
    """

    headline = "accuracy"

    def __init__(self, data: Path) -> None:
        if not data.is_dir():
            raise UserError(f"data is {data}; must be MME's folder, with one for each category")
        present = [name for name in PERCEPTION + COGNITION if (data / name).is_dir()]
        if not present:
            raise UserError(f"{data} has none of MME's folders, such as {PERCEPTION[0]} or {COGNITION[0]}")
        super().__init__(sample for name in present for sample in _category(data / name))

    def count(self, sample: Sample, answer: str) -> Counts:
        """Of the sample's category."""
        return {f"{sample.group}/right": parse(answer) == sample.reference, f"{sample.group}/asked": 1}

    def combine(self, counts: Sequence[Counts]) -> Counts:
        """And whether both answers about the image are right; an image of which one was asked does not count there."""
        sums = add(counts)
        category = next(iter(sums)).partition("/")[0]
        right, is_pair = sums[f"{category}/right"], sums[f"{category}/asked"] == 2
        return {**sums, f"{category}/both": is_pair and right == 2, f"{category}/images": is_pair}

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """Over all questions accuracy and accuracy+, and the benchmark's two sums of scores."""
        values = {}
        for name, part, whole in (("accuracy", "right", "asked"), ("accuracy_plus", "both", "images")):
            parts, wholes = (_total(totals, PERCEPTION + COGNITION, what) for what in (part, whole))
            values[name] = share(parts, wholes)
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            present = [each for each in categories if f"{each}/asked" in totals]
            scores = [_score(totals, each) for each in present]
            if scores:
                values[name] = np.sum(scores, axis=0)
        return values


def parse(text: str) -> str | None:
    """Yes or No by the benchmark's rule: one of the words is among the answer's first four characters."""
    start = text.strip().lower()[:4]
    return "Yes" if "yes" in start else "No" if "no" in start else None


def _score(totals: Mapping[str, Values], category: str) -> Values:
    right = share(totals[f"{category}/right"], totals[f"{category}/asked"])
    return right + share(totals[f"{category}/both"], totals[f"{category}/images"])


def _total(totals: Mapping[str, Values], categories: Sequence[str], what: str) -> Values:
    return np.sum([totals[f"{each}/{what}"] for each in categories if f"{each}/{what}" in totals], axis=0)


def _category(folder: Path) -> Iterator[Sample]:
    apart = folder / "questions_answers_YN"
    images, texts = (folder / "images", apart) if apart.is_dir() else (folder, folder)
    for path in sorted(texts.glob("*.txt")):
        found = [file.name for each in _IMAGES if (file := images / f"{path.stem}{each}").is_file()]
        if not found:
            raise UserError(f"{path}: there is no image {path.stem} (.jpg, .jpeg or .png) in {images}")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(filter(str.strip, lines), start=1):
            place, (text, _, label) = f"{path}, line {number}", line.partition("\t")
            label = label.strip()
            if label not in ("Yes", "No"):
                raise UserError(f"{place} ends in {shown(label)}; must be a question, a tab, and Yes or No")
            question, files = with_images(text.strip(), found, images.resolve(), place)
            name = f"{folder.name}/{path.stem}"
            yield Sample(f"{name}/{number}", question, files, label, group=folder.name, cluster=name)
