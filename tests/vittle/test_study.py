"""`vittle study`, cut down: that it runs, goes on where it stopped, and says what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vittle import UserError, study
from vittle.checkpoints import PARTIAL

SCALE = study.Scale(seeds=2, sweep_seeds=2, training=64, steps=2, questions=8, shifts=("frost:3", "rd:2", "fog:1+rd:2"))


@pytest.mark.slow
def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (study.PLAIN, "Vittle (L)", "LoRA, rank 16", "Vittle (F)")
    monkeypatch.setattr(study, "METHODS", {name: study.METHODS[name] for name in names})
    monkeypatch.setattr(study, "SWEEPS", {"alpha 0.1": study.SWEEPS["alpha 0.1"]})
    found = study.study(tmp_path, SCALE)
    assert {name: len(each) for name, each in found["results"].items()} == dict.fromkeys((*names, "alpha 0.1"), 2)
    assert set(found["results"]["plain"][0]) == {"clean", "image", "text", "joint", "jsd", "emid"}
    with Image.open(tmp_path / "study.png") as plot:
        assert plot.width > 1000
    trained: list[Any] = []
    monkeypatch.setattr(study, "train", trained.append)
    assert study.study(tmp_path, SCALE)["results"] == found["results"] and not trained
    assert json.loads((tmp_path / "study.json").read_text())["results"] == found["results"]
    (tmp_path / "runs" / "plain-0" / "model" / PARTIAL).mkdir()  # as a run leaves it that was killed at its end
    study.study(tmp_path, SCALE)
    assert [Path(each.output).parent.name for each in trained] == ["plain-0"]


def results(**changes: list[float]) -> dict[str, Any]:
    """Five seeds a method, plain tuning's numbers but for the changes of accuracy under image shifts."""
    base = [60.0, 61.0, 59.5, 60.5, 62.0]
    found = {}
    for name in (*study.METHODS, *study.SWEEPS):
        gain = changes.get(name.replace(" ", "_"), [0.0] * 5)
        found[name] = [
            {"clean": 90.0, "image": value + more, "text": 80.0, "joint": 50.0, "jsd": 0.1, "emid": 0.01}
            for value, more in zip(base, gain, strict=True)
        ]
    return found


def test_the_page_says_what_the_numbers_say() -> None:
    found = {
        "results": results(L2T=[2.0, 2.2, 1.9, 2.1, 2.0], plain=[0.0] * 5) | {},
        "settings": {"training": 16000, "max_steps": 500, "batch_size": 32, "questions": 400, "shifts": ["a"] * 28},
        "machine": {"commit": "abc", "cpu": "2 cores", "torch": "2.13"},
    }
    text = study.page(found)
    assert "- L2T: better than plain tuning under image shifts\n" in text
    others = "Vittle (F), Vittle (L), Vittle (F) + L2T, weight decay 0.1, LoRA, rank 16"
    assert f"- {others}: no difference from plain tuning beyond chance\n" in text
    assert "At this scale the bottleneck does not help." in text
    better = found | {"results": results(**{"Vittle_(F)": [2.0, 2.2, 1.9, 2.1, 2.0]})}
    assert "does not help" not in study.page(better)
    assert "| L2T | 90.0 ± 0.0 | 62.6 ± 1.0 |" in text
    assert "+2.0 (0.00)*" in text and "here there are 36 tests" in text
    gain, spread, p = study.gains(found["results"], "L2T", "image")
    assert (gain, spread) == pytest.approx((2.04, 0.114), abs=0.001) and p < 1e-4


def test_needs_a_spread(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seeds is 1; must be at least 2"):
        study.study(tmp_path, study.Scale(seeds=1))
