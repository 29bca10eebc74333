"""L2T's labels: which sentences are task templates, and what `vittle labels` shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_collate import item, processor
from test_template import TEMPLATES

from vittle.cli import main
from vittle.data import Collator
from vittle.demo.scenes import write_dataset
from vittle.errors import UserError
from vittle.labels import LOOKS, as_page, in_terminal, spans
from vittle.methods.instruct import TaskTemplates, sentences

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "python" / "vittle" / "demo" / "aligned"


def split(text: str) -> list[str]:
    return [text[i:j] for i, j in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is it?", ["What is it?"]),
        ("What is it?\nAnswer the question using a single word or phrase.",
         ["What is it?", "Answer the question using a single word or phrase."]),
        ("  One. Two!  Three \n\n four", ["One.", "Two!", "Three", "four"]),
        ("3.14 is e.g. a number", ["3.14 is e.g.", "a number"]),
        ("", []),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert split(text) == expected


@given(st.text(alphabet="ab.?! \n", max_size=40))
def test_sentences_leave_out_white_space_only(text: str) -> None:
    spans = list(sentences(text))
    assert all(i < j for i, j in spans) and spans == sorted(spans)
    assert "".join(text[i:j] for i, j in spans).split() is not None
    assert "".join("".join(split(text)).split()) == "".join(text.split())


def test_the_most_frequent_sentences_are_counted_over_everything(tmp_path: Path) -> None:
    instructions = [
        "What is it?\nAnswer briefly.",
        "Where is it?\nAnswer briefly.",
        "Why? Answer briefly.",
        "Why? Once.",
    ]
    templates = TaskTemplates.count(instructions, 2)
    assert dict(templates.counts) == {"Answer briefly.": 3, "Why?": 2}
    assert dict(TaskTemplates.count(instructions, 9).counts) == {
        "Answer briefly.": 3,
        "Why?": 2,
    }  # not what stands once
    templates.write(tmp_path)
    assert TaskTemplates.read(tmp_path / "task_templates.json") == templates
    assert [("Why? Answer briefly."[i:j]) for i, j in templates.spans("Why? Answer briefly.")] == [
        "Why?",
        "Answer briefly.",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), ("[", "is not JSON"), ('["a"]', "must hold an object of sentences")],
)
def test_a_bad_list_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        TaskTemplates.read(path)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_both_losses_share_the_instruction_mask(template: str) -> None:
    chat = item("<image> which digit is this? it is left. which?", "a six.", "what colour is <image> it?", "this")
    templates = TaskTemplates({"it is left.": 9, "which?": 9})
    batches = {
        (loss, listed): Collator(processor(template), loss=loss, task_templates=templates if listed else None)([chat])
        for loss in ("response", "instruct")
        for listed in (False, True)
    }
    masks = [batch["instruction_mask"] for batch in batches.values()]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    response = batches["response", False]["labels"]
    assert torch.equal(batches["response", True]["labels"], response)
    ids, mask = batches["response", True]["input_ids"], masks[0]
    assert torch.equal(batches["instruct", False]["labels"], torch.where(mask, ids, response))
    tokenizer = processor(template).tokenizer
    left_out = mask & (batches["instruct", True]["labels"] == -100)
    assert "".join(tokenizer.decode(ids[left_out]).split()) == "itisleft.which?"
    kept = mask & ~left_out
    assert "".join(tokenizer.decode(ids[kept]).split()) == "whichdigitisthis?whatcolourisit?"


@pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path, split="train", count=12, seed=0)
    command = ["labels", "--model", str(MODEL), "--data", str(data), "--images", str(tmp_path / "images")]
    assert main([*command, "--show", "2"]) == 0
    plain = capsys.readouterr().out
    assert plain.count("-- record") == 2 and "\x1b" not in plain and max(map(len, plain.splitlines())) <= 80
    question = json.loads(data.read_text())[0]["conversations"][0]["value"].split("\n")[-1]
    assert f"({question})" in plain and "{" in plain
    assert main([*command, "--show", "2", "--loss", "instruct", "--task-templates", "0"]) == 0
    assert f"[{question}]" in capsys.readouterr().out
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 5 and all(f'class="{kind}"' in page for kind in ("response", "instruction", "image"))
    assert "http" not in page


def test_colours_and_escapes() -> None:
    chat = item("<image> which < digit?", "a six.")
    runs = list(spans(Collator(processor()), chat))
    assert [kind for kind, _ in runs] == ["template", "image", "template", "instruction", "template", "response"]
    assert runs[1] == ("image", "<image> x 4")
    colour = in_terminal([("one", runs)], colour=True)
    assert all(f"\x1b[{look.ansi}m" in colour for look in LOOKS.values())
    assert "which &lt; digit?" in as_page([("one", runs)], "x")
