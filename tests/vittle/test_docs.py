"""Every block of docs/vittle.md, docs/vpgc.md and docs/discriminative.md, in order, on small models and scenes."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_train_vpgc import write_blip

from vittle.cli import main
from vittle.demo.scenes import write_dataset
from vittle.discriminative import read_pairs

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "python" / "vittle" / "demo" / "aligned"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")
@pytest.mark.filterwarnings("ignore")
def test_every_block_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(MODEL)
    write_dataset(tmp_path, split="train", count=8, seed=0).rename("llava_v1_5_mix665k.json")
    blocks = BLOCK.findall((ROOT / "docs" / "vittle.md").read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks] == ["bash", *["python"] * 6]
    names: dict[str, object] = {}
    for kind, text in blocks:
        text = text.replace("llava-hf/llava-1.5-7b-hf", "./model").replace("layer=25", "layer=4")
        if kind == "bash":
            for line in text.strip().splitlines():
                assert main([*shlex.split(line)[1:], "--max-steps", "2", "--workers", "0", "--batch-size", "4"]) == 0
        elif "trl" not in text or find_spec("trl"):
            exec(compile(text, "docs/vittle.md", "exec"), names)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"bottleneck", "lora", "small", "trainer", "vittle"}


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")
@pytest.mark.filterwarnings("ignore")
def test_every_block_about_the_second_look_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_blip(tmp_path / "blip", image=64)
    names: dict[str, Any] = {}
    text = (ROOT / "docs" / "vpgc.md").read_text(encoding="utf-8").replace("docs/recipes", f"{ROOT}/docs/recipes")
    text = text.replace("llava-hf/llava-1.5-7b-hf", str(MODEL)).replace("Salesforce/blip2-opt-2.7b", "./blip")
    for kind, block in BLOCK.findall(text):
        if kind == "python":
            exec(compile(block, "docs/vpgc.md", "exec"), names)
            continue
        for line in block.strip().splitlines():
            words = [*shlex.split(line)[1:], "--max-steps", "2", "--workers", "0", "--batch-size", "4"]
            assert main([*words, "--warmup-ratio", "0"]) == 0
    assert {path.name for path in (tmp_path / "runs").glob("*/vpgc.safetensors")} == {"vpgc.safetensors"}
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/vpgc.safetensors")} == {"vpgc", "linear", "all"}


@pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")
@pytest.mark.filterwarnings("ignore")
def test_every_block_about_pairs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photographs are two scenes, whose every part is the reader's to give."""
    monkeypatch.chdir(tmp_path)
    scenes = write_dataset(tmp_path / "scenes", split="train", count=2, seed=0).parent / "images"
    mask = np.zeros((64, 64), dtype=bool)
    mask[:32] = True
    names: dict[str, Any] = {
        "photographs": sorted(scenes.iterdir()),
        "captions": {file.stem: "A scene." for file in scenes.iterdir()},
        "segment": lambda image: [("digits", mask)],
        "background": lambda image: ~mask,
        "inpaint": lambda image, mask, kind: image.rotate(180),
        "looks_right": lambda image: True,
        "tell": lambda caption, object, kind: f"{kind}: {object}",
        "attend": lambda images: np.ones((len(images), 4, 4)),
    }
    text = (ROOT / "docs" / "discriminative.md").read_text(encoding="utf-8")
    for kind, block in BLOCK.findall(text):
        if kind == "bash":
            words = shlex.split(block.replace("llava-hf/llava-1.5-7b-hf", str(MODEL)))[1:]
            assert main([*words, "--max-steps", "2", "--workers", "0", "--batch-size", "4"]) == 0
        else:
            exec(compile(block, "docs/discriminative.md", "exec"), names)
    assert (tmp_path / "pairs" / "gallery.html").exists() and (tmp_path / "comparisons" / "comparisons.json").exists()
    assert len(read_pairs("own/pairs.json")) == 4
    (example,) = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for name in ("dog.jpg", "dog-0.png", "masks/dog-0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    (tmp_path / "pairs.json").write_text(example)
    assert read_pairs(tmp_path / "pairs.json")[0].object == "ball"
