"""``vittle compare``: several evaluations of one task beside each other, with paired bootstrap intervals.

Clusters of samples are drawn with replacement, the same ones for all runs and conditions; a difference counts where
95 % of its resamples lie on one side of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vittle.errors import UserError
from vittle.evaluation import Evaluation, open_evaluation
from vittle.shifts import Condition
from vittle.tasks import Task
from vittle.tasks.task import Counts, Totals

RESAMPLES = 10_000
_CHUNK = 250
"""Resamples at a time: their weights of 10,000 clusters are 20 MB."""

GROUPS = ("clean", "image", "text", "joint")


@dataclass(frozen=True)
class Difference:
    """A run's headline metric less the first run's: 95 % of its resamples lie between low and high."""

    value: float
    low: float
    high: float

    @property
    def is_within_noise(self) -> bool:
        """Whether zero is among them."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """Rows are conditions and means over groups of them; columns are runs, the first of which is compared with."""

    headline: str
    names: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[float, ...], tuple[Difference, ...]]]
    clusters: int


def compare(folders: Sequence[str | Path], *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Compares evaluations with the first of them, over the samples that all have answers to.

    Raises:
        UserError: a folder holds no evaluation, or they are of other samples, of another task, or have no
            condition in common.
    """
    if len(folders) < 2:
        raise UserError(f"there is {len(folders)} evaluation to compare; must be at least 2")
    runs = [open_evaluation(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        for setting in ("task", "samples_sha256", "seed", "max_new_tokens", "judge_model", "languages"):
            here, there = (each.settings[setting] for each in (run, first))
            if setting == "languages":
                both = here.keys() & there.keys()
                here, there = ({name: each[name] for name in both} for each in (here, there))
            if here != there:
                told = {"samples_sha256": "data", "languages": "translations"}.get(setting, setting)
                raise UserError(f"{run.folder} has another {told} than {first.folder}; only like can be compared")
    conditions = [each for each in first.conditions if all(_is_whole(run, each) for run in runs)]
    if not conditions:
        raise UserError("the evaluations have no condition in common whose answers are all there")
    tables = _Tables(first.task, [[run.scored(each) for each in conditions] for run in runs])
    measured = tables.headlines(np.ones((1, tables.clusters)))[:, :, 0]
    resampled = _resampled(tables, seed, resamples)
    rows = {}
    for name, members in _rows(conditions).items():
        values = measured[:, members].mean(1)
        spread = resampled[:, members].mean(1)
        gains, spreads = values[1:] - values[0], spread[1:] - spread[0]
        differences = (Difference(float(gain), *_interval(each)) for gain, each in zip(gains, spreads, strict=True))
        rows[name] = tuple(map(float, values)), tuple(differences)
    return Comparison(first.task.headline, _names(runs), rows, tables.clusters)


def _resampled(tables: _Tables, seed: int, resamples: int) -> NDArray[np.float64]:
    """The headline of every run, condition and resample."""
    rng, chunks = np.random.default_rng(seed), []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        weights = rng.multinomial(tables.clusters, np.full(tables.clusters, 1 / tables.clusters), size=size)
        chunks.append(tables.headlines(weights.astype(np.float64)))
    return np.concatenate(chunks, axis=2)


class _Tables:
    """What is counted of every cluster under every run and condition, over the samples that all of them answered."""

    def __init__(self, task: Task, scored: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self.task = task
        common = set.intersection(
            *({id for id, answer in each.items() if task.is_scored(answer)} for run in scored for each in run)
        )
        if not common:
            raise UserError("there is no sample that all evaluations have an answer to")
        counted = [[task.clusters({id: each[id] for id in common}) for each in run] for run in scored]
        names = list(counted[0][0])
        self.clusters = len(names)
        self._counts = [[_columns([each[name] for name in names]) for each in run] for run in counted]

    def headlines(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The headline metric (runs, conditions, resamples) where each cluster counts as often as its weight says."""
        return np.array([[self._headline(columns, weights) for columns in run] for run in self._counts])

    def _headline(self, columns: Mapping[str, NDArray[np.float64]], weights: NDArray[np.float64]) -> Any:
        totals = Totals({name: weights @ column for name, column in columns.items()})
        return self.task.metrics(totals)[self.task.headline]


def _columns(clusters: Sequence[Counts]) -> dict[str, NDArray[np.float64]]:
    names = {name for counts in clusters for name in counts}
    return {name: np.array([counts.get(name, 0) for counts in clusters], dtype=np.float64) for name in sorted(names)}


def _rows(conditions: Sequence[Condition]) -> dict[str, list[int]]:
    """Means first, where they are of several conditions; then each condition."""
    members = {group: [i for i, each in enumerate(conditions) if each.group == group] for group in GROUPS}
    shifted = [i for i, each in enumerate(conditions) if each.group != "clean"]
    means = {f"mean, {group}": which for group, which in members.items() if len(which) > 1}
    if len(shifted) > max(map(len, means.values()), default=1):
        means["mean, all shifts"] = shifted
    return means | {each.name: [i] for i, each in enumerate(conditions)}


def _interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return float(low), float(high)


def _is_whole(run: Evaluation, condition: Condition) -> bool:
    return condition in run.conditions and run.is_answered(condition) and bool(run.scored(condition))


def _names(runs: Sequence[Evaluation]) -> tuple[str, ...]:
    """Of the folders; their paths where two have the same name."""
    names = tuple(run.folder.resolve().name for run in runs)
    return names if len(set(names)) == len(names) else tuple(str(run.folder) for run in runs)


def table(comparison: Comparison) -> str:
    """For a terminal: each run's metric, and below it the interval of its difference from the first run's."""
    first, *others = (name[-14:] for name in comparison.names)
    lines = [f"{comparison.headline.replace('_', ' '):22}{first:>14}" + "".join(f"{name:>22}" for name in others)]
    for row, (values, differences) in comparison.rows.items():
        cells = (
            f"{each.value:+.1f} [{each.low:+.1f}, {each.high:+.1f}]{' ' if each.is_within_noise else '*'}"
            for each in differences
        )
        lines.append(f"{row[:22]:22}{values[0]:>14.1f}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(
        [
            *lines,
            "",
            f"Differences from {first} with their 95 % intervals: paired bootstrap, {comparison.clusters} clusters.",
            "*: the interval leaves out zero; all other differences are within noise. Of",
            "differences that are nothing but noise, one in twenty is starred.",
        ]
    )
