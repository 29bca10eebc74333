"""Digit scenes: what may be drawn for whom, what the page shows, what is true of it, and its files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vittle.data import LlavaDataset
from vittle.demo import ALIGNED, checkpoint
from vittle.demo.checkpoint import make_processor
from vittle.demo.scenes import (
    CANVAS,
    CAPTION_PROMPT,
    CELLS,
    KINDS,
    PAPER,
    SPLITS,
    Placed,
    Scene,
    Split,
    ask,
    caption,
    questions,
    render,
    sample_scene,
    split_scans,
    write_dataset,
)


def scenes(split: Split, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(count)]


def sentences(text: str) -> list[str]:
    return text.removesuffix(".").split(". ")


def judge(sentence: str, scene: Scene) -> tuple[str, bool]:
    """The wording of a caption's sentence, and whether it is true of the scene."""
    content = dict.fromkeys(CELLS, "nothing") | {CELLS[p.cell]: str(p.digit) for p in scene.placed}
    if match := re.fullmatch(r"The (\d) is not here", sentence):
        return "is not here", match[1] not in content.values()
    if match := re.fullmatch(r"The (\d) is (.+)", sentence):
        return "is", content.get(match[2]) == match[1]
    match = re.fullmatch(r"The (.+) shows (.+)", sentence)
    return "shows", match is not None and content.get(match[1]) == match[2]


@pytest.fixture(scope="module")
def three_seven_three() -> Scene:
    """3 at the top left, 7 at the top right, 3 at the bottom right."""
    targets = load_digits().target
    first = {digit: int(np.flatnonzero(targets == digit)[0]) for digit in (3, 7)}
    second_three = int(np.flatnonzero(targets == 3)[1])
    return Scene(
        (
            Placed(first[3], 3, 0, 2, 3, 24),
            Placed(first[7], 7, 1, 36, 0, 26),
            Placed(second_three, 3, 3, 38, 40, 22),
        )
    )


class TestSplit:
    def test_parts_the_scans(self) -> None:
        train, held_out = split_scans()["train"], split_scans()["held_out"]
        assert sorted(train + held_out) == list(range(1797))

    def test_holds_out_a_quarter_of_every_digit(self) -> None:
        targets = load_digits().target
        everywhere = Counter(targets.tolist())
        held_out = Counter(targets[list(split_scans()["held_out"])].tolist())
        for digit in range(10):
            assert held_out[digit] / everywhere[digit] == pytest.approx(0.25, abs=0.005)

    def test_is_the_one_that_the_checkpoint_was_made_with(self) -> None:
        assert split_scans()["held_out"][:5] == (1, 5, 9, 12, 14)
        assert sum(split_scans()["held_out"]) == 403_788


class TestSampling:
    @pytest.mark.parametrize("split", SPLITS)
    def test_draws_from_its_own_side_only(self, split: Split) -> None:
        drawn = {placed.scan for scene in scenes(split, 4000) for placed in scene.placed}
        assert drawn == set(split_scans()[split])

    def test_tells_the_digits_that_the_scans_show(self) -> None:
        targets = load_digits().target
        assert all(p.digit == targets[p.scan] for scene in scenes("train", 300) for p in scene.placed)

    def test_keeps_each_digit_in_its_own_cell(self) -> None:
        for scene in scenes("train", 500):
            cells = [p.cell for p in scene.placed]
            assert cells == sorted(set(cells))
            for p in scene.placed:
                column, row = p.cell % 2 * 32, p.cell // 2 * 32
                assert column <= p.left <= p.left + p.side <= column + 32
                assert row <= p.top <= p.top + p.side <= row + 32

    def test_draws_every_number_of_digits_equally_often(self) -> None:
        counts = Counter(len(scene.placed) for scene in scenes("train", 2000))
        assert sorted(counts) == [1, 2, 3, 4]
        assert all(abs(n - 500) < 100 for n in counts.values())

    def test_follows_its_generator(self) -> None:
        assert scenes("train", 20, seed=4) == scenes("train", 20, seed=4)
        assert scenes("train", 20, seed=4) != scenes("train", 20, seed=5)


class TestRender:
    def test_leaves_all_but_the_boxes_blank(self, three_seven_three: Scene) -> None:
        image = render(three_seven_three)
        assert (image.mode, image.size) == ("RGB", (CANVAS, CANVAS))
        inked = (np.asarray(image) != PAPER).any(axis=-1)
        for p in three_seven_three.placed:
            box = inked[p.top : p.top + p.side, p.left : p.left + p.side]
            assert box.mean() > 0.2
            box[:] = False
        assert not inked.any()

    def test_shows_the_scan_upright(self, three_seven_three: Scene) -> None:
        """Averaged back to 8x8, the darkness of a box is the scan."""
        image = render(three_seven_three).convert("L")
        for p in three_seven_three.placed:
            box = image.crop((p.left, p.top, p.left + p.side, p.top + p.side))
            small = np.asarray(box.resize((8, 8), Image.Resampling.BOX), dtype=float)
            scan = load_digits().images[p.scan]
            assert np.corrcoef(scan.ravel(), -small.ravel())[0, 1] > 0.95


class TestText:
    def test_caption_in_reading_order(self, three_seven_three: Scene) -> None:
        assert caption(three_seven_three) == (
            "The top left shows 3. The top right shows 7. The bottom left shows nothing. The bottom right shows 3."
        )

    def test_varied_captions_are_true_in_three_wordings(self, three_seven_three: Scene) -> None:
        rng = np.random.default_rng(0)
        captions = [caption(three_seven_three, rng) for _ in range(50)]
        told = [judge(sentence, three_seven_three) for text in captions for sentence in sentences(text)]
        assert len(told) == 4 * len(captions)
        assert set(told) == {("shows", True), ("is", True), ("is not here", True)}

    def test_every_question_once_with_its_true_answer(self) -> None:
        for scene in scenes("held_out", 100):
            grid: list[int | None] = [None] * 4
            for p in scene.placed:
                grid[p.cell] = p.digit
            seen = [digit for digit in grid if digit is not None]
            filled = {cell: d for cell, d in zip(CELLS, grid, strict=True) if d is not None}
            expected = {f"Which digit is at the {cell}?": str(d) for cell, d in filled.items()}
            expected |= {f"Is there a {d}?": "yes" if seen.count(d) else "no" for d in range(10)}
            expected["How many digits are there?"] = str(4 - grid.count(None))
            expected["What is the sum of the digits?"] = str(sum(seen))
            asked = questions(scene)
            assert len(asked) == len(expected)
            assert {q.text: q.answer for q in asked} == expected

    def test_yes_and_no_are_as_likely(self) -> None:
        rng = np.random.default_rng(0)
        answers = Counter(ask(scene, "presence", rng).answer for scene in scenes("train", 1000))
        assert abs(answers["yes"] - 500) < 60


class TestDataset:
    def test_is_llavas_format_and_readable(self, tmp_path: Path) -> None:
        path = write_dataset(tmp_path, split="train", count=8, seed=3)
        records = json.loads(path.read_text())
        assert [record["kind"] for record in records] == [*KINDS, *KINDS]
        for record in records:
            assert set(record) == {"id", "image", "conversations", "kind"}
            human, gpt = record["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image>\n")
        items = LlavaDataset(path, tmp_path / "images")
        assert [item["id"] for item in items] == [record["id"] for record in records]

    @pytest.mark.parametrize("kind", ["questions", "captions"])
    def test_pairs_each_image_with_its_own_text(self, tmp_path: Path, kind: str) -> None:
        """The scenes drawn again from the seed: their pixels come back, and the text is true of them."""
        path = write_dataset(tmp_path, split="held_out", count=6, seed=9, kind=kind)
        rng = np.random.default_rng(9)
        for index, record in enumerate(json.loads(path.read_text())):
            scene = sample_scene(rng, "held_out")
            reply = caption(scene, rng) if kind == "captions" else ask(scene, KINDS[index % 4], rng).answer
            assert record["conversations"][1]["value"] == reply
            with Image.open(tmp_path / "images" / record["image"]) as image:
                assert image.tobytes() == render(scene).tobytes()

    def test_is_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            write_dataset(tmp_path / name, split="train", count=5, seed=seed)
        a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / n).rglob("*.*")} for n in "abc")
        assert a == b != c

    def test_shows_no_json_until_all_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_dataset(tmp_path, split="train", count=3, seed=0)
        calls = [0, 1]
        monkeypatch.setattr("vittle.demo.scenes.render", lambda scene: (calls.pop(), render(scene))[1])
        with pytest.raises(IndexError):
            write_dataset(tmp_path, split="train", count=3, seed=1)
        assert not list(tmp_path.glob("*.json"))


@pytest.fixture(scope="module")
def aligned() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return LlavaForConditionalGeneration.from_pretrained(ALIGNED), AutoProcessor.from_pretrained(ALIGNED)


class TestCheckpoint:
    def test_is_small(self) -> None:
        assert sum(file.stat().st_size for file in ALIGNED.iterdir()) <= 5_000_000

    def test_loads_whole_as_float32(self) -> None:
        model, info = LlavaForConditionalGeneration.from_pretrained(ALIGNED, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_its_processor_is_the_one_of_the_code(self, aligned: Any, tmp_path: Path) -> None:
        make_processor().save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            assert file.read_text() == (ALIGNED / file.name).read_text()

    def test_its_tokenizer_knows_every_word(self, aligned: Any) -> None:
        tokenizer = aligned[1].tokenizer
        rng = np.random.default_rng(0)
        for scene in scenes("train", 100):
            for text in [caption(scene, rng), *(f"{q.text} {q.answer}" for q in questions(scene))]:
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_its_chat_is_llavas(self, aligned: Any) -> None:
        content = [{"type": "image"}, {"type": "text", "text": "Is there a 7?"}]
        chat = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ]
        apply = aligned[1].apply_chat_template
        assert apply(chat, tokenize=False) == "USER: <image>\nIs there a 7? ASSISTANT: yes</s>"
        assert apply(chat[:1], tokenize=False, add_generation_prompt=True) == "USER: <image>\nIs there a 7? ASSISTANT:"

    def test_describes_held_out_scenes(self, aligned: Any) -> None:
        """Of the sentences that it writes about 100 scenes of unseen scans, 95% are true; chance is below 30%."""
        model, processor = aligned
        drawn = scenes("held_out", 100)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        batch = processor(text=[prompt] * 100, images=[render(s) for s in drawn], return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
        texts = processor.batch_decode(written, skip_special_tokens=True)
        told = [judge(each, scene) for text, scene in zip(texts, drawn, strict=True) for each in sentences(text)]
        assert len(told) == 400
        assert np.mean([true for _, true in told]) >= 0.95

    def test_is_made_of_training_scans_alone_and_anew_alike(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One step of each stage, twice with one seed; both stages draw from the training scans."""
        drawn: list[str] = []
        seen: list[str] = []

        def sample(rng: np.random.Generator, split: Split) -> Scene:
            drawn.append(split)
            return sample_scene(rng, split)

        def train(*args: Any) -> None:
            before = len(drawn)
            train_once(*args)
            seen.extend(drawn[before:])

        train_once = checkpoint.train
        monkeypatch.setattr(checkpoint, "sample_scene", sample)
        monkeypatch.setattr(checkpoint, "train", train)
        for name in ("a", "b"):
            checkpoint.make(tmp_path / name, seed=0, reading_steps=1, caption_steps=1)
        assert seen == ["train"] * (4 * checkpoint.BATCH)
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
        assert weights[0] == weights[1]
