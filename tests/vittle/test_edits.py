"""Edits of digit scenes: which pixels they change, with whose scans, and what is said and asked of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vittle.demo import checkpoint, edits
from vittle.demo.edits import (
    COMPARISONS,
    WORDS,
    EditedScene,
    ScenePicture,
    comparisons,
    difference,
    edit,
    picture,
    pictures,
    write_questions,
    write_scene_pairs,
)
from vittle.demo.scenes import CELLS, PAPER, SPLITS, Placed, Scene, Split, render, sample_scene, split_scans
from vittle.discriminative import Kind, make_edits, read_pairs
from vittle.discriminative.pairs import PROMPT
from vittle.tasks.exact import Exact

Triple = tuple[ScenePicture, int, Kind, EditedScene]


@pytest.fixture(scope="module")
def made() -> list[Triple]:
    """Every edit that 150 training scenes admit."""
    rng = np.random.default_rng(0)
    return [
        (each, chosen, kind, edit(each, chosen, kind, rng))
        for each in pictures("train", 150, seed=0)
        for chosen, one in enumerate(each.objects)
        for kind in one.kinds
    ]


def of_kind(made: list[Triple], kind: Kind) -> list[tuple[ScenePicture, int, EditedScene]]:
    found = [(before, chosen, after) for before, chosen, each, after in made if each == kind]
    assert len(found) > 100
    return found


def changed(before: ScenePicture, after: EditedScene) -> np.ndarray:
    return (np.asarray(before.image) != np.asarray(after.image)).any(axis=-1)


def box(placed: Placed) -> np.ndarray:
    mask = np.zeros((64, 64), dtype=bool)
    mask[placed.top : placed.top + placed.side, placed.left : placed.left + placed.side] = True
    return mask


def at(scene: Scene, cell: int) -> Placed:
    (found,) = (p for p in scene.placed if p.cell == cell)
    return found


class TestObjects:
    def test_are_the_cells_in_order_and_part_the_ink(self) -> None:
        for each in pictures("held_out", 50, seed=1):
            assert [one.name for one in each.objects] == list(each.scene.contents)
            ink = (np.asarray(each.image) != PAPER).any(axis=-1)
            digits = np.array([one.mask for one in each.objects if one.name != "nothing"])
            assert (digits.sum(axis=0) == ink).all()

    def test_of_an_empty_cell_is_the_cell(self) -> None:
        each = picture("", Scene((Placed(0, 0, 1, 35, 3, 24),)), "held_out")
        for cell, rows, columns in ((0, (0, 32), (0, 32)), (2, (32, 64), (0, 32)), (3, (32, 64), (32, 64))):
            expected = np.zeros((64, 64), dtype=bool)
            expected[slice(*rows), slice(*columns)] = True
            assert (each.objects[cell].mask == expected).all()

    def test_admit_what_can_be_done(self) -> None:
        for each in pictures("train", 200, seed=2):
            digits = each.scene.digits
            expected = {"modify"}
            expected |= {"delete"} if len(digits) > 1 else set()
            expected |= {"swap"} if len(set(digits)) > 1 else set()
            for one in each.objects:
                assert set(one.kinds) == ({"add"} if one.name == "nothing" else expected)


class TestEdits:
    def test_modify_changes_the_digit_in_its_box(self, made: list[Triple]) -> None:
        for before, chosen, after in of_kind(made, "modify"):
            old, new = at(before.scene, chosen), at(after.scene, chosen)
            assert new.digit != old.digit and box(new).tolist() == box(old).tolist()
            assert not changed(before, after)[~box(old)].any()
            alone = np.asarray(render(Scene((new,))))
            assert (np.asarray(after.image)[box(old)] == alone[box(old)]).all()

    def test_swap_exchanges_two_digits_and_leaves_the_boxes(self, made: list[Triple]) -> None:
        for before, chosen, after in of_kind(made, "swap"):
            cells = [p.cell for p in before.scene.placed if p != at(after.scene, p.cell)]
            assert len(cells) == 2 and chosen in cells
            (old, new), (other, becomes) = ((at(before.scene, c), at(after.scene, c)) for c in cells)
            assert (new.scan, becomes.scan) == (other.scan, old.scan) and old.digit != other.digit
            assert not changed(before, after)[~(box(old) | box(other))].any()
            assert (box(new) == box(old)).all() and (box(becomes) == box(other)).all()

    def test_delete_takes_the_ink_and_no_more(self, made: list[Triple]) -> None:
        for before, chosen, after in of_kind(made, "delete"):
            mask = before.objects[chosen].mask
            assert (changed(before, after) == mask).all()
            assert (np.asarray(after.image)[mask] == PAPER).all()

    def test_add_puts_a_digit_where_none_was(self, made: list[Triple]) -> None:
        for before, chosen, after in of_kind(made, "add"):
            assert len(after.scene.placed) == len(before.scene.placed) + 1
            added = (np.asarray(render(Scene((at(after.scene, chosen),)))) != PAPER).any(axis=-1)
            assert (changed(before, after) == added).all()
            assert not added[~before.objects[chosen].mask].any()

    def test_leave_scenes_in_reading_order(self, made: list[Triple]) -> None:
        for _, _, _, after in made:
            cells = [p.cell for p in after.scene.placed]
            assert cells == sorted(set(cells)) and 1 <= len(cells) <= 4

    @pytest.mark.parametrize("split", SPLITS)
    def test_draw_from_the_picture_s_split_alone(self, split: Split) -> None:
        rng = np.random.default_rng(3)
        scans = set()
        for each in pictures(split, 500, seed=3):
            for _, _, edited in make_edits(each, range(4), edit, 4, rng):
                scans |= {p.scan for p in (*each.scene.placed, *edited.scene.placed)}
        assert scans <= set(split_scans()[split]) and len(scans) > 400


class TestTexts:
    def test_say_every_cell_that_differs_and_no_other(self, made: list[Triple]) -> None:
        for before, _, kind, after in made:
            told = re.findall(
                r"The (\w+ \w+) shows (\w+) and now (\w+)\.(?: |$)", difference(before.scene, after.scene)
            )
            assert len(told) == (2 if kind == "swap" else 1)
            contents = dict(zip(CELLS, before.scene.contents, strict=True))
            for cell, old, new in told:
                assert contents[cell] == old
                contents[cell] = new
            assert tuple(contents.values()) == after.scene.contents

    def test_of_the_four_edits(self) -> None:
        three, five = Placed(0, 3, 0, 0, 0, 24), Placed(1, 5, 3, 32, 32, 24)
        scene = Scene((three, five))
        for after, text in (
            (Scene((Placed(2, 4, 0, 0, 0, 24), five)), "The top left shows 3 and now 4."),
            (Scene((five,)), "The top left shows 3 and now nothing."),
            (Scene((three, Placed(2, 4, 1, 32, 0, 24), five)), "The top right shows nothing and now 4."),
            (Scene((Placed(1, 5, 0, 0, 0, 24), Placed(0, 3, 3, 32, 32, 24))),
             "The top left shows 3 and now 5. The bottom right shows 5 and now 3."),
        ):  # fmt: skip
            assert difference(scene, after) == text

    def test_need_these_words_and_no_others(self, made: list[Triple]) -> None:
        texts = [PROMPT, *(difference(before.scene, after.scene) for before, _, _, after in made)]
        for before, _, _, after in made:
            texts += [f"{q.text} {q.answer}" for q in comparisons(before.scene, after.scene)]
        used = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}
        known = {*checkpoint.WORDS, *checkpoint.NUMBERS}
        assert used - known == set(WORDS)


class TestQuestions:
    def test_every_one_with_its_true_answer(self) -> None:
        rng = np.random.default_rng(4)
        for _ in range(100):
            scenes = [sample_scene(rng, "held_out") for _ in range(2)]
            for question in comparisons(*scenes):
                assert question.answer == answer(question.text, scenes)
            kinds = Counter(question.kind for question in comparisons(*scenes))
            assert kinds["which_image"] == len({*scenes[0].digits, *scenes[1].digits})
            assert kinds["which_digit"] == len(scenes[0].digits + scenes[1].digits) and kinds["total"] == 1

    def test_are_a_task_in_turn_and_true_of_the_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: dict[bytes, Scene] = {}

        def remembered(scene: Scene) -> Image.Image:
            page = render(scene)
            drawn[page.tobytes()] = scene
            return page

        monkeypatch.setattr(edits, "render", remembered)
        data = write_questions(tmp_path, split="held_out", count=400, seed=5)
        task = Exact(data, tmp_path / "images")
        assert [sample.group for sample in task.samples] == [*COMPARISONS] * 100
        assert task.score({sample.id: sample.reference for sample in task.samples}) == {"accuracy": 100.0}
        for sample in task.samples:
            first, second = (drawn[Image.open(file).tobytes()] for file in sample.images)
            question = sample.question.removeprefix("<image>\n<image>\n")
            if sample.group == "spot_the_difference":
                assert question == PROMPT
                assert sample.reference == difference(first, second)
            else:
                assert sample.reference == answer(question, [first, second])
        spotted = [sample.reference for sample in task.samples if sample.group == "spot_the_difference"]
        assert min(sum(f"The {cell} " in text for text in spotted) for cell in CELLS) >= 20
        which = Counter(sample.reference for sample in task.samples if sample.group == "which_image")
        assert set(which) == {"first", "second", "both"} and min(which.values()) >= 15

    def test_are_drawn_from_their_split(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[Scene] = []
        monkeypatch.setattr(edits, "render", lambda scene: (drawn.append(scene), render(scene))[1])
        write_questions(tmp_path, split="held_out", count=40, seed=6)
        assert {p.scan for scene in drawn for p in scene.placed} <= set(split_scans()["held_out"])

    def test_follow_their_seed(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            write_questions(tmp_path / name, split="train", count=8, seed=seed)
        a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / n).rglob("*.*")} for n in "abc")
        assert a == b != c


def answer(question: str, scenes: Sequence[Scene]) -> str:
    """Worked out from the contents alone."""
    first, second = (scene.contents for scene in scenes)
    if match := re.fullmatch(r"In which image is the (\d)\?", question):
        return {(True, False): "first", (False, True): "second", (True, True): "both"}[
            match[1] in first, match[1] in second
        ]
    if match := re.fullmatch(r"Which digit is at the (.+) of the (first|second) image\?", question):
        return (first if match[2] == "first" else second)[CELLS.index(match[1])]
    assert question == "How many digits are in the two images together?"
    return str(8 - (first + second).count("nothing"))


class TestPairs:
    def test_are_whole_and_alike_for_one_seed(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            write_scene_pairs(tmp_path / name, split="train", count=10, seed=seed)
        a, b, c = (
            {str(f.relative_to(tmp_path / n)): f.read_bytes() for f in (tmp_path / n).rglob("*.*")} for n in "abc"
        )
        assert a == b != c
        assert len(read_pairs(tmp_path / "a" / "pairs.json")) == 20

    def test_of_training_show_no_held_out_scan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[Scene] = []
        monkeypatch.setattr(edits, "render", lambda scene: (drawn.append(scene), render(scene))[1])
        write_scene_pairs(tmp_path, split="train", count=40, seed=0)
        assert not {p.scan for scene in drawn for p in scene.placed} & set(split_scans()["held_out"])

    def test_edit_what_the_model_ignores(self, tmp_path: Path) -> None:
        """A map that looks at the top only: where a kind can be made at the bottom, it is."""

        def attend(images: Sequence[Image.Image]) -> np.ndarray:
            return np.tile([[[3.0], [1.0]]], (len(images), 1, 1))

        data = write_scene_pairs(tmp_path, split="train", count=40, seed=7, attend=attend)
        scenes = {each.id: each for each in pictures("train", 40, seed=7)}
        seen = set()
        for record in json.loads(data.read_text()):
            each = scenes[record["id"].rpartition("-")[0]]
            admitting = {c // 2 for c, one in enumerate(each.objects) if record["kind"] in one.kinds}
            row = 1 if "bottom" in record["difference"].split(" shows")[0] else 0
            if record["id"].endswith("-0") and record["kind"] != "swap":
                assert row == max(admitting)
                seen.add(row)
            assert 1 <= record["significance"] <= 3
        assert seen == {0, 1}
