"""The second look's experiment, cut down: what its Llama reads, what its eyes are told, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vittle import UserError
from vittle.demo import bases, edits, second_look
from vittle.demo.checkpoint import IMAGE_TOKENS, WIDTH, make_processor, save
from vittle.demo.scenes import sample_scene
from vittle.discriminative import read_pairs
from vittle.evaluate import Asking, ask, batches
from vittle.methods.vpgc import LinearLook, QFormerLook, attach_vpgc

SCALE = second_look.Scale(seeds=2, pictures=6, steps=2, questions=8, language_steps=2, eyes_steps=(2, 2, 2))


def test_images_in_words() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "train")
    words = bases.words_of(scene, rng, wrong=0.0)
    assert [words[0], words[3], words[12], words[15]] == list(scene.contents) and len(words) == IMAGE_TOKENS
    noisy = [bases.words_of(scene, rng, wrong=0.5) for _ in range(200)]
    wrong = np.mean([one != other for each in noisy for one, other in zip(each, words, strict=True)])
    assert wrong == pytest.approx(0.5 * 10 / 11, abs=0.03)


def test_texts_ask_for_all_kinds_and_have_labels_on_answers_alone() -> None:
    processor = make_processor(edits.WORDS)
    texts = bases.Texts(processor, seed=0)
    told = [bases.sample_told(texts.rng, images) for images in (1, 2) for _ in range(150)]
    assert {question.kind for _, question in told} == {
        "caption", *second_look.MEANS["single-image"], *second_look.MEANS["multi-image"],
    }  # fmt: skip
    batch = texts.batch(told)
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]
    for ids, labels, (scenes, question) in zip(batch["input_ids"], batch["labels"], told, strict=True):
        answer = processor.tokenizer(f"{question.answer}</s>", add_special_tokens=False).input_ids
        assert labels[labels != -100].tolist() == answer
        begin = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids(":")) + 1
        words = processor.tokenizer.convert_ids_to_tokens(ids[begin : begin + IMAGE_TOKENS * len(scenes)].tolist())
        assert {*words} <= {*bases.CONTENTS}


def test_captions_tell_the_upper_row_alone() -> None:
    processor = make_processor(edits.WORDS)
    scenes = bases.UpperRows(processor, "train", 0, size=40)
    for text in processor.batch_decode(next(scenes.captions())["input_ids"]):
        assert "bottom" not in text and ("top" in text or "scene shows nothing" in text)
    _, contents = next(scenes.patches())
    assert (contents[:, 8:] != bases.NOTHING).any()


@pytest.mark.parametrize(("form", "look"), [("qformer", QFormerLook), ("linear", LinearLook)])
def test_bases(form: bases.Form, look: type) -> None:
    processor = make_processor(edits.WORDS)
    torch.manual_seed(0)
    model = bases.untrained(form, processor).eval()
    assert isinstance(attach_vpgc(model), look)
    batch = next(bases.UpperRows(processor, "train", 0, size=3).captions())
    with torch.no_grad():
        assert model(**batch).logits.shape == (*batch["input_ids"].shape, len(processor.tokenizer))
    assert bases.Sight(model)(batch["pixel_values"]).shape == (3, IMAGE_TOKENS, len(bases.CONTENTS))
    assert bases.Aligning(model, processor)(batch["pixel_values"]).shape == (3, IMAGE_TOKENS, len(bases.CONTENTS))
    assert model.config.text_config.hidden_size == WIDTH


@pytest.mark.parametrize("form", bases.FORMS)
def test_what_a_base_answers_is_what_it_would_write(form: bases.Form, tmp_path: Path) -> None:
    """`evaluate.ask` finds where the prompt ends, whatever the form: one step at a time it comes to the same words."""
    processor = make_processor(edits.WORDS)
    torch.manual_seed(0)
    model = bases.untrained(form, processor).eval()
    task = second_look._tasks(tmp_path, 4)["comparisons"]
    found = [each for batch in ask(model, processor, batches(task.samples, 4), asking=Asking(3)) for each in batch]
    for sample in task.samples:
        images = [Image.open(path) for path in sample.images]
        text = f"USER: {'<image>' * 2} {sample.question.rpartition('>')[2].strip()} ASSISTANT:"
        batch = processor(text=text, images=[images], return_tensors="pt")
        ids = batch["input_ids"]
        for _ in range(3):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
        written = processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert next(each.text for each in found if each.id == sample.id) == written


def test_captions_alone_are_as_many_as_captions_and_pairs(tmp_path: Path) -> None:
    processor = make_processor(edits.WORDS)
    save(bases.untrained("qformer", processor), processor, tmp_path / "base")
    paths = second_look.write_training(tmp_path / "training", tmp_path / "base", 30, 0)
    assert all(pair.significance is not None for pair in read_pairs(tmp_path / "training" / "pairs.json"))
    records = {data: json.loads(path.read_text()) for data, path in paths.items()}
    assert len(records["captions"]) == len(records["captions + pairs"]) > 150
    told = [each["conversations"][1]["value"] for each in records["captions"]]
    assert all("bottom" not in text for text in told)
    pairs = [each for each in records["captions + pairs"] if len(each["image"]) == 2]
    assert pytest.approx(len(pairs) / len(records["captions + pairs"]), abs=0.01) == 24 / 88
    assert any("bottom" in each["conversations"][1]["value"] for each in pairs)


@pytest.mark.slow
def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "HELD_OUT", 50)
    monkeypatch.setattr(second_look, "MAX_NEW_TOKENS", {"comparisons": 2, "questions": 2})
    first, last = second_look.CONDITIONS[0], second_look.CONDITIONS[-1]
    monkeypatch.setattr(second_look, "CONDITIONS", (first, last))
    monkeypatch.setattr(second_look, "QUESTIONS", ())
    found = second_look.experiment(tmp_path, SCALE)
    counts = {form: {name: len(runs) for name, runs in each.items()} for form, each in found["results"].items()}
    assert counts == {"qformer": {first.name: 2}, "linear": {last.name: 2}}
    assert {*second_look.MEANS, "sum", "total", "seconds"} <= {*found["results"]["linear"][last.name][0]}
    assert (tmp_path / "gallery.html").stat().st_size > 1000
    with Image.open(tmp_path / "second_look.png") as plot:
        assert plot.width > 1000
    (tmp_path / "runs" / "qformer-projection-captions-1" / "result.json").unlink()
    trained: list[Any] = []
    train = second_look.train
    monkeypatch.setattr(second_look, "train", lambda config: trained.append(config) or train(config))
    again = second_look.experiment(tmp_path, SCALE)
    assert [(each.tuning, each.seed) for each in trained] == [("projector", 1)]
    for each in (found, again):
        for runs in (run for form in each["results"].values() for run in form.values()):
            for run in runs:
                del run["seconds"]
    assert again["results"] == found["results"]
    with pytest.raises(UserError, match="another scale"):
        second_look.experiment(tmp_path, second_look.Scale(seeds=2))


def test_the_page_says_what_the_numbers_say() -> None:
    kinds = [*second_look.MEANS, *(kind for kinds in second_look.MEANS.values() for kind in kinds)]
    noise = [0.0, 0.4, -0.3, 0.1, -0.2]

    def runs(accuracy: float, turned: int) -> list[dict[str, float]]:
        return [dict.fromkeys(kinds, accuracy + each) for each in noise[turned:] + noise[:turned]]

    results: dict[str, Any] = {form: {} for form in bases.FORMS}
    for place, condition in enumerate(second_look.CONDITIONS):
        better = condition.form == "qformer" and condition.name == "VPG-C, captions + pairs"
        results[condition.form][condition.name] = runs(60.0 if better else 40.0, place % 4)
    found = {
        "results": results,
        "untuned": {form: dict.fromkeys(kinds, 35.0) for form in bases.FORMS},
        "bases": {"language": dict.fromkeys(kinds, 98.0), **{form: {"captions_right": 0.912} for form in bases.FORMS}},
        "settings": {"max_steps": 400, "batch_size": 24, "questions": 400},
        "machine": {"commit": "abc", "cpu": "2 cores", "torch": "2.13"},
    }
    text = second_look.page(found)
    assert "the base tells 91.2% as captions do" in text
    lines = [line for line in text.splitlines() if line.startswith(("| qformer", "| linear"))]
    assert len(lines) == len(second_look.QUESTIONS)
    assert [line.split("|")[2:4] for line in lines if line.endswith("| better |")] == [
        [" VPG-C, captions + pairs ", " projection, captions + pairs "],
        [" VPG-C, captions + pairs ", " VPG-C, captions "],
        [" VPG-C, captions + pairs ", " VPG-C after half, captions + pairs "],
    ]
    assert all(line.endswith(("| better |", "| no difference |")) for line in lines)
