"""The page of edited pairs, as a browser without a network shows it."""

from __future__ import annotations

import base64
import io
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import BROWSER

from vittle.demo.edits import write_scene_pairs
from vittle.discriminative import Pair, read_pairs, write_gallery

SCRIPT = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of scenes, of which one has no map and hostile texts, and one of a large, wide photograph."""
    folder = tmp_path_factory.mktemp("gallery")

    def attend(images: Sequence[Image.Image]) -> np.ndarray:
        return np.tile([[0.1, 0.2], [0.3, 0.9]], (len(images), 1, 1))

    data = write_scene_pairs(folder, split="train", count=4, seed=0, attend=attend)
    pairs = [stored.load() for stored in read_pairs(data)]
    pairs[1] = replace(pairs[1], attention=None, significance=None, object=SCRIPT, difference=SCRIPT, caption=SCRIPT)
    photo = Image.effect_noise((900, 500), 60).convert("RGB")
    mask = np.zeros((500, 900), dtype=bool)
    mask[100:300, 200:600] = True
    pairs.append(Pair(id="'>" + SCRIPT, kind="delete", object="dog", difference="The dog is gone.", image=photo,
                      edited=photo, mask=mask))  # fmt: skip
    write_gallery(pairs, folder / "gallery.html", title=f"Pairs {SCRIPT}")
    return folder / "gallery.html"


def images(page: Path) -> list[tuple[str, Image.Image]]:
    """The captions and pictures of the page."""
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="([^"]*)"', page.read_text(encoding="utf-8"))
    return [(name, Image.open(io.BytesIO(base64.b64decode(data)))) for data, name in found]


def test_holds_all_it_needs_and_escapes_all_texts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") == 7
    links = re.findall(r'(?:src|href)="([^"#]+)', text)
    assert len(links) == 9 * 4 - 2 and all(link.startswith("data:image/jpeg;base64,") for link in links)
    for told in ("no map", "The dog is gone.", "chosen: dog", "edited: delete"):
        assert told in text
    assert [path.name for path in page.parent.glob(".*")] == []


def test_shows_what_the_pair_holds(page: Path) -> None:
    """Enlarged four times and drawn anew from the scene's own pixels, up to JPEG."""
    stored = read_pairs(page.parent / "pairs.json")[0].load()
    (_, original), (_, heat), (name, outlined), (_, edited) = images(page)[:4]
    assert name == f"chosen: {stored.object}, {stored.significance:.3g}"
    for shown, expected in ((original, stored.image), (edited, stored.edited)):
        large = expected.resize((256, 256), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(shown, int) - np.asarray(large, int)).mean() < 3
    assert heat.convert("L").getpixel((250, 250)) > heat.convert("L").getpixel((5, 5)) + 60  # type: ignore[operator]
    inside = np.kron(stored.mask, np.ones((4, 4), bool))
    red, green, _ = np.moveaxis(np.asarray(outlined, int), -1, 0)
    line = (red > 180) & (green < 110)
    assert line.sum() > 100 and not (line & inside).sum() > 0.02 * inside.sum()


def test_makes_large_photographs_small(page: Path) -> None:
    assert [picture.size for _, picture in images(page)[-3:]] == [(256, 142)] * 3


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1100, 390])
def test_in_a_browser_without_a_network(page: Path, tmp_path: Path, width: int) -> None:
    """In a frame of that width, as a headless window is never as narrow as a phone."""
    script = (
        "<script>addEventListener('load', () => {const page = frames[0], all = [...page.document.images]; "
        "const tops = new Set([...page.document.querySelectorAll('.pair')[0].children].map(e => e.offsetTop)); "
        "document.body.dataset.seen = [page.document.title, all.length, all.filter(i => i.naturalWidth > 0).length, "
        "page.document.documentElement.scrollWidth <= page.innerWidth, tops.size].join('|')})</script>"
    )
    frame = f'<iframe src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>'
    (tmp_path / "probe.html").write_text(f"<body>{frame}{script}</body>", encoding="utf-8")
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--allow-file-access-from-files", "--window-size=1300,900"]  # fmt: skip
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [*command, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    title, count, shown, fits, rows = re.search(r'data-seen="([^"]*)"', dom)[1].split("|")  # type: ignore[index]
    assert title.startswith("Pairs") and count == shown == "34"
    assert (fits, rows) == ("true", "1" if width == 1100 else "3")
