"""Questions with one right answer each, in LLaVA's JSON format; the digit scenes that are made here are such."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vittle.data.llava import LlavaDataset
from vittle.errors import UserError
from vittle.tasks.task import Counts, Sample, Task, Values, share


class Exact(Task):
    """An answer is right if it is the reference, apart from case and a final full stop.

    Args:
        data: records of one question and its answer; `kind`, if they have it, is the group.
        images: folder that the image paths start from.

    Raises:
        UserError: a record is malformed or has several questions, or an image is missing.
    """

    headline = "accuracy"

    def __init__(self, data: Path, images: Path) -> None:
        super().__init__(_samples(data, images))

    def count(self, sample: Sample, answer: str) -> Counts:
        """Right or wrong."""
        return {"asked": 1, "right": _normal(answer) == _normal(sample.reference)}

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """Accuracy."""
        return {"accuracy": share(totals["right"], totals["asked"])}


class DigitScenes(Exact):
    """The demo's held-out scenes of handwritten digits, made here: the task that needs no file.

    Args:
        folder: where the scenes are, or are written.
        count: how many questions.
        seed: of the scenes.
    """

    max_new_tokens = 6

    def __init__(self, folder: Path, count: int = 400, seed: int = 1) -> None:
        from vittle.demo.scenes import write_dataset

        data = folder / "questions.json"
        if not data.exists():
            write_dataset(folder, split="held_out", count=count, seed=seed)
        super().__init__(data, folder / "images")


def _samples(data: Path, images: Path) -> Iterator[Sample]:
    dataset = LlavaDataset(data, images)
    for index in range(len(dataset)):
        record = dataset.record(index)
        if len(record.turns) != 2:
            raise UserError(
                f"{data}: record {record.id!r} has {len(record.turns)} turns; must be a question, an answer"
            )
        question, answer = record.turns
        yield Sample(str(record.id), question, record.images, answer, group=record.kind)


def _normal(text: str) -> str:
    return text.strip().rstrip(".").lower()
