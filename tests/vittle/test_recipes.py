"""Every command of docs/data.md on small parts, recipes included, and what is said of a bad recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_assemble import parts  # noqa: F401
from test_docs import BLOCK, MODEL, ROOT

from vittle.cli import main
from vittle.demo.scenes import write_dataset


@pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")
@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: tuple[Path, Path],  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_dataset(tmp_path, split="train", count=8, seed=0)
    for name in ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"):
        (tmp_path / name).symlink_to(data)
    replaced = {
        "llava-hf/llava-1.5-7b-hf": str(MODEL), "openai/clip-vit-large-patch14-336": str(parts[0]),
        "lmsys/vicuna-7b-v1.5": str(parts[1]), "docs/recipes": str(ROOT / "docs" / "recipes"),
    }  # fmt: skip
    commands = []
    for kind, text in BLOCK.findall((ROOT / "docs" / "data.md").read_text(encoding="utf-8")):
        assert kind == "bash"
        for line in text.strip().splitlines():
            for name, path in replaced.items():
                line = line.replace(name, path)
            words = shlex.split(line)[1:]
            if words[0] == "train":
                words += ["--max-steps", "2", "--workers", "0", "--batch-size", "4", "--save-steps", "0"]
                words += ["--layer", "2"] if "vittle.yaml" in line else []
            commands.append(words)
    assert [words[0] for words in commands] == ["labels", "train", "assemble", "train", "train"]
    for words in commands:
        assert main(words) == 0, words
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"aligned", "l2t", "start", "tuned"}
    assert (tmp_path / "runs" / "l2t" / "task_templates.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a: [", "is not YAML"),
        ("- 1", "must hold options and values, such as `learning-rate: 2.0e-5`"),
        ("colour: red", "has 'colour', which is no option of vittle train"),
        ("layer: [1]", "has [1] for layer; must be one value"),
        ("layer:", "has None for layer; must be one value"),
    ],
)
def test_a_bad_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["train", "--config", str(path), "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"vittle: config {re.escape(str(path))} .*\n", error) and message in error


def test_the_command_line_overrides_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: from-file\ndata: a.json\nimages: b\noutput: c\nplain: true\nresume: false\nmax_steps: 3\n")
    assert main(["train", "--config", str(path), "--images", str(tmp_path)]) == 2
    assert "a.json cannot be read" in capsys.readouterr().err
