"""`vittle compare`: its intervals against a bootstrap written out, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vittle import UserError
from vittle.cli import main
from vittle.compare import Comparison, compare
from vittle.evaluation import Evaluation, digest
from vittle.shifts import parse_conditions
from vittle.tasks import DigitScenes

CONDITIONS = ["clean", "frost:3", "fog:3", "rd:2"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Writes an evaluation in which each question is answered rightly with a probability."""

    def make(name: str, right: float, seed: int = 0, count: int = 200) -> Path:
        folder, rng = tmp_path / name, np.random.default_rng(seed)
        task = DigitScenes(folder / "scenes", count=count)
        settings = {
            "model": name, "task": "digits", "data": None, "images": None, "samples_sha256": digest(task.samples),
            "limit": None, "batch_size": 16, "max_new_tokens": 6, "seed": 0, "languages": {}, "judge_model": None,
            "conditions": CONDITIONS,
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(settings))
        evaluation = Evaluation(folder, settings, task, task.samples)
        (folder / "answers").mkdir()
        for condition in parse_conditions(CONDITIONS):
            lines = []
            for sample in evaluation.samples:
                answer = sample.reference if rng.random() < right else "wrong"
                lines.append(json.dumps({"id": sample.id, "question": sample.question, "answer": answer}) + "\n")
            (folder / "answers" / f"{condition.file_name}.jsonl").write_text("".join(lines))
        return folder

    return make


def test_intervals_against_a_bootstrap_written_out(run: Callable[..., Path]) -> None:
    folders = [run("one", 0.5), run("other", 0.65, seed=1)]
    found = compare(folders, resamples=4000)
    right = []
    for folder in folders:
        records = map(json.loads, (folder / "answers" / "frost-3.jsonl").read_text().splitlines())
        task = DigitScenes(folder / "scenes")
        right.append(np.array([record["answer"] == task.by_id[record["id"]].reference for record in records], float))
    gain = right[1] - right[0]
    rng = np.random.default_rng(7)
    resamples = [gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(4000)]
    low, high = 100 * np.quantile(resamples, [0.025, 0.975])
    (first, second), (difference,) = found.rows["frost:3"]
    assert (first, second) == pytest.approx((100 * right[0].mean(), 100 * right[1].mean()))
    assert difference.value == pytest.approx(100 * gain.mean())
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.8)
    # the mean over conditions is the mean of theirs, with a narrower interval
    means = [found.rows[name][0] for name in ("frost:3", "fog:3", "rd:2")]
    assert found.rows["mean, image"][0] == pytest.approx(np.mean(means[:2], axis=0))
    assert found.rows["mean, all shifts"][0] == pytest.approx(np.mean(means, axis=0))
    of_mean = found.rows["mean, all shifts"][1][0]
    assert of_mean.high - of_mean.low < difference.high - difference.low


def test_what_is_noise(run: Callable[..., Path]) -> None:
    def marks(found: Comparison) -> list[bool]:
        return [differences[0].is_within_noise for _, differences in found.rows.values()]

    base = run("base", 0.5)
    assert not any(marks(compare([base, run("better", 0.9, seed=1)], resamples=1000)))
    assert not any(marks(compare([base, run("worse", 0.1, seed=1)], resamples=1000)))
    same = [marks(compare([base, run(f"same {seed}", 0.5, seed=seed)], resamples=1000)) for seed in range(1, 9)]
    assert np.mean(same) > 0.8
    assert all(marks(compare([base, base], resamples=100)))


def test_the_same_seed_gives_the_same_table(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run("one", 0.5)), str(run("other", 0.65, seed=1)), str(run("third", 0.4, seed=2))]
    tables = []
    for _ in range(2):
        assert main(["compare", *folders]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and max(map(len, tables[0].splitlines())) <= 80
    difference = compare(folders[:2]).rows["frost:3"][1][0]
    told = f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
    assert told in next(line for line in tables[0].splitlines() if line.startswith("frost:3"))
    assert "one" in tables[0] and "third" in tables[0] and "*" in tables[0]


def test_refuses(run: Callable[..., Path], tmp_path: Path) -> None:
    one, few = run("one", 0.5), run("few", 0.5, count=40)
    with pytest.raises(UserError, match=r"few has another data than .*one; only like can be compared"):
        compare([one, few])
    with pytest.raises(UserError, match="there is 1 evaluation to compare"):
        compare([one])
    with pytest.raises(UserError, match="holds no evaluation"):
        compare([one, tmp_path])
    cut = run("cut", 0.5)
    for path in (cut / "answers").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="no condition in common"):
        compare([one, cut])
