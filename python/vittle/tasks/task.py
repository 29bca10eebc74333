"""A task: questions about images, and what the answers come to.

What is counted of single answers adds up, and every metric is a function of the sums. So the same few lines score a
whole task, a group of its samples, and the resamples of a bootstrap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vittle.data.llava import MARKER, image_file
from vittle.errors import UserError, shown

Counts = Mapping[str, float]
Values = NDArray[np.float64]  # a number, or one for each resample


@dataclass(frozen=True)
class Sample:
    """A question about images, which stand in its text as `<image>` markers."""

    id: str
    question: str
    images: tuple[Path, ...]
    reference: str
    group: str = ""
    """A part of the task that is scored by itself too."""
    cluster: str = ""
    """Samples of one cluster hang together, as those of one image do; none: the sample stands alone."""
    context: str = ""
    """What a judge who sees no image reads about it."""


class Task(ABC):
    """Samples, and how their answers are scored.

    Raises:
        UserError: there are no samples, or two with the same id.
    """

    headline: str
    """The metric that tables, plots and comparisons lead with: the higher the better."""
    max_new_tokens: ClassVar[int] = 128
    is_judged: ClassVar[bool] = False
    """Whether a judge's verdict is counted rather than the answer itself."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = tuple(samples)
        if not self.samples:
            raise UserError("the task has no samples")
        ids = Counter(sample.id for sample in self.samples)
        if repeated := [id for id, times in ids.items() if times > 1]:
            raise UserError(f"id {shown(repeated[0])} stands {ids[repeated[0]]} times in the task; must stand once")

    @cached_property
    def by_id(self) -> Mapping[str, Sample]:
        """The samples by their ids."""
        return {sample.id: sample for sample in self.samples}

    @property
    def groups(self) -> Sequence[str]:
        """In the order in which they come."""
        return list(dict.fromkeys(sample.group for sample in self.samples if sample.group))

    @abstractmethod
    def count(self, sample: Sample, answer: Any) -> Counts:
        """What is counted of one answer, or of one verdict of the judge."""

    def is_scored(self, answer: Any) -> bool:
        """Whether an answer, or a verdict, counts at all."""
        return True

    def combine(self, counts: Sequence[Counts]) -> Counts:
        """What is counted of a cluster: the sums of its samples' counts."""
        return add(counts)

    @abstractmethod
    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """The task's metrics, shares in percent, of the sums of all that was counted; NaN where there is nothing."""

    def clusters(self, answers: Mapping[str, Any], group: str | None = None) -> dict[str, Counts]:
        """What is counted of each cluster, by its name, over the samples that have an answer."""
        members: dict[str, list[Counts]] = {}
        for sample in self.samples:
            if sample.id in answers and group in (None, sample.group):
                members.setdefault(sample.cluster or sample.id, []).append(self.count(sample, answers[sample.id]))
        return {name: self.combine(counts) for name, counts in members.items()}

    def worth(self, sample: Sample, answer: Any) -> float:
        """The headline metric of one answer by itself."""
        totals = self.combine([self.count(sample, answer)])
        return float(self._values(totals)[self.headline])

    def score(self, answers: Mapping[str, Any], group: str | None = None) -> dict[str, float]:
        """The metrics over the samples that have an answer."""
        values = self._values(add(self.clusters(answers, group).values()))
        return {name: float(value) for name, value in values.items()}

    def _values(self, totals: Counts) -> dict[str, Values]:
        return self.metrics(Totals({name: np.asarray(value, dtype=np.float64) for name, value in totals.items()}))


class Totals(dict[str, Values]):
    """Sums by name; what was never counted is 0."""

    def __missing__(self, name: str) -> Values:
        return np.zeros(())


def add(counts: Iterable[Counts]) -> Counts:
    """Sums by name."""
    sums: dict[str, float] = {}
    for each in counts:
        for name, value in each.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def share(part: Values, whole: Values) -> Values:
    """In percent; NaN of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.divide(part, whole)


def with_images(text: str, names: Sequence[str], folder: Path, place: str) -> tuple[str, tuple[Path, ...]]:
    """The question with a marker for each image, which stand before a text that has none, and the image files.

    Raises:
        UserError: markers and images differ in number, or an image is missing or outside the folder.
    """
    markers = text.count(MARKER)
    if not markers:
        text = f"{MARKER}\n" * len(names) + text
    elif markers != len(names):
        raise UserError(f"{place}: {markers} {MARKER} marker(s) and {len(names)} image(s); each must have the other")
    try:
        return text, tuple(image_file(name, folder) for name in names)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
