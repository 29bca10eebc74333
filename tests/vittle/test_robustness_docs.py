"""Every command of docs/robustness.md, in order, on POPE's format and the demo's small model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from chat_server import serving
from PIL import Image

import vittle
from vittle.cli import main
from vittle.demo import ALIGNED
from vittle.metrics import CLUB
from vittle.models import load_model, load_processor
from vittle.shifts import IMAGE_SHIFTS, SYNONYM_SHIFTS, TEXT_SHIFTS, vittle_preset
from vittle.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"


@pytest.mark.filterwarnings("ignore")
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = load_model(str(ALIGNED)), load_processor(str(ALIGNED))
    model.save_pretrained("runs/plain")
    model.model.vision_tower.save_pretrained("encoders/image")
    processor.image_processor.save_pretrained("encoders/image")
    model.get_decoder().save_pretrained("encoders/text")
    processor.tokenizer.save_pretrained("encoders/text")
    vittle.attach_bottleneck(model)
    model.save_pretrained("runs/vittle")
    for folder in ("runs/plain", "runs/vittle"):
        processor.save_pretrained(folder)
    Path("val2014").mkdir()
    Path("coco").mkdir()
    questions = []
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 120)).save(f"val2014/{number}.jpg")
        for label in ("yes", "no"):
            text = f"Is there a {len(questions)} in the image?"
            questions.append({"question_id": len(questions), "image": f"{number}.jpg", "text": text, "label": label})
    Path("coco/coco_pope_random.json").write_text("".join(f"{json.dumps(each)}\n" for each in questions))
    torch.save(CLUB(128, 128, 8).state_dict(), "CLUB_global.pt")

    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.strip().splitlines()]
    assert [command[0] for command in commands] == ["evaluate", "evaluate", "compare", "translate", "emid"]
    with serving(lambda message, times: f"Frage: {message}") as server:
        stand_ins = {
            "http://localhost:8000/v1": server.url,
            "openai/clip-vit-base-patch32": "encoders/image",
            "FacebookAI/xlm-roberta-base": "encoders/text",
        }
        for command in commands:
            command = [stand_ins.get(word, word) for word in command]
            if command[0] == "evaluate":
                command += ["--max-new-tokens", "2", "--workers", "0"]
            assert main(command) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "mean, joint" in told and "jsd" not in told and "EMID" in told
    assert len(Path("translations.jsonl").read_text().splitlines()) == 3 * len(questions)


def test_the_page_names_what_there_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in (*TASKS, "digits", *IMAGE_SHIFTS, *TEXT_SHIFTS, *SYNONYM_SHIFTS):
        assert re.search(rf"\b{name}\b", text), name
    for condition in vittle_preset():
        assert all(shift is None or shift.kind in text.split("**`vittle`**")[1] for shift in vars(condition).values())
