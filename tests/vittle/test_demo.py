"""The main job, whole: as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vittle.cli import main


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    accuracy = report["accuracy"]
    # The comparison means something only if the plain model really learns.
    assert accuracy["plain"]["clean"] >= 0.75 and accuracy["guessing"] < 0.35
    for method in ("plain", "bottleneck"):
        assert 0 <= accuracy[method]["shifted"] <= 1
        assert len(accuracy[method]["by_shift"]) >= 4
        assert all(len(severities) == 3 for severities in accuracy[method]["by_shift"].values())
    assert report["kl"]["plain"] is None and report["kl"]["bottleneck"]["vision"] > 0
    assert report["seed"] == 0 and report["seconds"] > 0
    with Image.open(tmp_path / "demo" / "report.png") as plot:
        assert plot.width > 800
    table = capsys.readouterr().out[-3000:]
    assert "accuracy, clean" in table
    lines = table[table.index("accuracy, clean") :].splitlines()
    assert max(map(len, lines[:20])) <= 80
    leftovers = [path.name for path in tmp_path.iterdir()]
    assert leftovers == ["demo"]
