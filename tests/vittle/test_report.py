"""The page of an evaluation, as a browser without a network shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vittle.demo import ALIGNED
from vittle.demo.scenes import write_dataset
from vittle.evaluation import EvaluateConfig, evaluate, open_evaluation
from vittle.report import write_report
from vittle.tables import table

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCRIPT = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    folder = tmp_path_factory.mktemp("report")
    data = write_dataset(folder, split="held_out", count=8, seed=3)
    records = json.loads(data.read_text())
    for record in records:
        record["conversations"][0]["value"] += f" {SCRIPT}"
    (folder / "images" / "questions-00002.png").write_bytes(b"no image")
    data.write_text(json.dumps(records))
    return EvaluateConfig(
        model=str(ALIGNED), task="exact", output=str(folder / "run"), data=str(data), images=str(folder / "images"),
        shifts=("frost:1-3", "keyboard:7", "fog:2+rd:3"), batch_size=8, max_new_tokens=4, workers=0, layer_jsd=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(config: EvaluateConfig) -> Path:
    summary = evaluate(config)
    path = Path(config.output) / "report.html"
    write_report(open_evaluation(config.output), summary, path)
    return path


def test_holds_all_it_needs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert SCRIPT not in text and "&lt;script&gt;" in text
    links = re.findall(r'(?:src|href)="([^"#]+)', text)
    assert links and all(link.startswith("data:image/jpeg;base64,") for link in links)
    for told in ("frost:3", "fog:2+rd:3", "How far shifts move the states", "Broken images", "questions-00002.png"):
        assert told in text
    assert "frost:1" not in re.findall(r"<figcaption>.*?</figcaption>", text, re.DOTALL)[1]
    assert [path.name for path in page.parent.glob(".*")] == []


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_in_a_browser_without_a_network(page: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => {const images = [...document.images]; document.body.dataset.seen = "
        "[document.title, images.length, images.filter(i => i.naturalWidth > 0).length, "
        "document.querySelectorAll('svg').length, document.documentElement.scrollWidth <= innerWidth].join('|')})"
        "</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</html>", f"{script}</html>"), encoding="utf-8")
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [BROWSER, *flags, "--window-size=1100,900", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120).stdout
    title, images, shown, plots, fits = re.search(r'data-seen="([^"]*)"', dom)[1].split("|")  # type: ignore[index]
    assert title == "aligned on exact"
    assert images == shown and int(images) >= 8
    assert (plots, fits) == ("2", "true")
    subprocess.run([*command, f"--screenshot={tmp_path / 'page.png'}", page.as_uri()], check=True, timeout=120,
                   capture_output=True)  # fmt: skip
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100


def test_the_table_fits_a_terminal(config: EvaluateConfig, page: Path) -> None:
    lines = table(open_evaluation(config.output).summary()).splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-2] == "1 samples have broken images and do not count. The first:"
    assert evaluate(replace(config, layer_jsd=False))["layer_jsd"]
