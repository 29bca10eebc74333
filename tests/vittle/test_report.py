"""The page of an evaluation, as a browser without a network shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import serving
from PIL import Image

from vittle import report
from vittle.demo import ALIGNED
from vittle.demo.scenes import write_dataset
from vittle.evaluation import EvaluateConfig, evaluate, open_evaluation
from vittle.report import REPORT, _plots, _tables, show, write_report
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
    captions = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert captions == ["clean", "frost:3", "keyboard:7", "fog:2+rd:3"] * 4  # of each kind the hardest
    assert [path.name for path in page.parent.glob(".*")] == [".lock"]


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


def test_all_images_broken(config: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.data is not None and config.images is not None
    images = shutil.copytree(config.images, tmp_path / "images")
    for file in images.iterdir():
        file.write_bytes(b"no image")
    config = replace(config, images=str(images), output=str(tmp_path / "run"), shifts=("frost:1",), layer_jsd=False)
    summary = evaluate(config)
    lines = table(summary).splitlines()
    assert lines[0] == "8 samples have broken images and do not count. The first:"
    assert re.search(r"questions-0000\d\.png cannot be decoded", lines[1]) and len(lines) == 2
    show(config.output)
    page = (tmp_path / "run" / REPORT).read_text(encoding="utf-8")
    assert "Broken images" in page and "Examples" not in page
    assert "8 samples have broken images" in capsys.readouterr().out
    assert table({**summary, "broken": {}}) == "no condition is whole yet"


def summary_of(values: dict[str, float]) -> dict[str, Any]:
    def group(name: str) -> str:
        return "clean" if name == "clean" else "joint" if "+" in name else "image" if "frost" in name else "text"

    conditions = {
        name: {"group": group(name), "metrics": {"accuracy": value}, "groups": {}} for name, value in values.items()
    }
    return {"headline": "accuracy", "means": {}, "conditions": conditions, "broken": {}}


def test_languages_have_rows_of_their_own() -> None:
    long = "A language whose name has 40 characters."
    values = {"clean": 9.0, "keyboard:4": 1.0, "rs:4": 2.0, "translation:German": 3.0, "translation:²": 4.0,
              f"translation:{long}": 5.0, f"elastic_transform:5+translation:{long}": 6.0}  # fmt: skip
    lines = table(summary_of(values)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "text shifts, severity          4" in lines and "  keyboard                   1.0" in lines
    assert lines[lines.index("translations") :][1].split() == ["German", "3.0"]
    assert f"  {long}         5.0" in lines
    assert list(_plots(summary_of(values))) == []
    tables = {each.title: (each.head, each.rows) for each in _tables(summary_of(values))}
    assert tables["Text shifts: accuracy"] == (["severity", "4"], [["keyboard", "1.0"], ["rs", "2.0"]])
    assert tables["Translations"] == (["", "accuracy"], [["German", "3.0"], ["²", "4.0"], [long, "5.0"]])
    (plot,) = _plots(summary_of({**values, "keyboard:2": 7.0}))
    assert ">keyboard<" in plot.svg and "translation" not in plot.svg


def test_what_the_judge_failed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five questions the third gets no scores, and the fourth gets them at the second reply."""
    files: dict[str, list[dict[str, Any]]] = {"questions": [], "context": [], "answers_gpt4": []}
    for number in range(5):
        Image.new("RGB", (32, 32), (50 * number, 90, 120)).save(tmp_path / f"{number}.png")
        of = {"question_id": number, "image": f"{number}.png"}
        files["questions"].append({**of, "text": f"Question {number}?", "category": "conv"})
        files["context"].append({**of, "caption": "A square."})
        files["answers_gpt4"].append({**of, "text": "It is a square."})
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))

    seen = set[str]()

    def reply(message: str, times: int) -> str:
        question = next(line for line in message.splitlines() if line.startswith("Question "))
        is_first = question not in seen
        seen.add(question)
        return "I cannot say." if question == "Question 2?" or (question == "Question 3?" and is_first) else "8 6"

    with serving(reply) as server:
        evaluate(EvaluateConfig(
            model=str(ALIGNED), task="llava-bench", output=str(tmp_path / "run"), data=str(tmp_path),
            images=str(tmp_path), shifts=("frost:1",), batch_size=5, max_new_tokens=2, workers=0,
            judge_url=server.url, judge_model="m",
        ))  # fmt: skip
    show(str(tmp_path / "run"))
    told = capsys.readouterr().out
    page = (tmp_path / "run" / REPORT).read_text(encoding="utf-8")
    assert "2 answers were not judged and do not count; 7 replies had no scores." in told
    assert max(map(len, told.splitlines()[:-1])) <= 80
    assert "Failures of the judge" in page and "nan" not in page
    assert "not judged: " not in page and page.count('<div class="sample">') == 4  # those that were judged come first
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page.split("Failures of the judge")[1])
    assert rows == [("clean", "1", "4"), ("frost:1", "1", "3")]
    monkeypatch.setattr(report, "EXAMPLES", 5)
    show(str(tmp_path / "run"))
    last = (tmp_path / "run" / REPORT).read_text(encoding="utf-8").split('<div class="sample">')[-1]
    assert "Question 2?" in last and last.count('<span class="">not judged: ') == 2
