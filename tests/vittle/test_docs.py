"""Every block of docs/vittle.md, in order, on the demo's small model and scenes."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from vittle.cli import main
from vittle.demo.scenes import write_dataset

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
