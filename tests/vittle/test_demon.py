"""DEMON in its own layout: metrics by hand, what is asked and refused, runs that go on, the page's commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

import vittle.evaluation
from vittle import UserError
from vittle.cli import main
from vittle.demo import ALIGNED
from vittle.demon import page, run, score
from vittle.metrics.demon import (
    CATEGORIES,
    FULL_ONLY,
    QUESTION_TYPES,
    category_scores,
    is_right,
    is_right_image,
    multi_choice,
    normalise,
    rouge_l,
)
from vittle.shifts.protected import protected_spans
from vittle.tasks import load_task
from vittle.tasks.demon import Demon

PAGE = Path(__file__).parents[2] / "docs" / "demon.md"


def record(id: Any = 0, context: str = "{image#1}{image#2}What is it?", **change: Any) -> dict[str, Any]:
    """A record as the benchmark has it; None takes a field away."""
    instance = {"context": context, "images_path": ["0.png", "1.png"], "choice_list": ["a red cat", "a blue dog"]}
    whole = {"sample_id": id, "task_instruction_id": 1, "task_instance": instance, "response": "a blue dog"}
    for name, value in change.items():
        part = instance if name in ("images_path", "choice_list") else whole
        part[name] = value
        if value is None:
            del part[name]
    return whole


def write_task(root: Path, name: str, records: Any, folder: str = "", **metadata: Any) -> Path:
    """A task's folder, with three images."""
    core = root / (folder or name) / "core"
    (core / "images").mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (90 * number, 60, 120)).save(core / "images" / f"{number}.png")
    told = {
        "dataset": name,
        "split": "core",
        "num_sample": len(records),
        "task_instruction": ["Look. ", "Look closely. "],
        "question_type": QUESTION_TYPES.get(name, "multi-choice"),
    }
    (core / "core.json").write_text(json.dumps({"metadata": told | metadata, "data": records}))
    return core.parent


class TestRougeL:
    @pytest.mark.parametrize(
        ("prediction", "reference", "precision", "recall"),
        [
            ("the cat sat on the mat", "the cat is on the mat", 4 / 5, 4 / 5),  # of the, cat, on, mat: unique words
            ("a dog runs", "a dog runs fast today", 3 / 3, 3 / 5),
            ("the the the", "the", 1, 1),
            ("one two", "two one", 1 / 2, 1 / 2),
            ("In\n1999,\tA \"Dog\" ran!", "in 1999. a dog ran.", 1, 1),
            ("3.5 metres", "35 metres", 1 / 3, 1 / 2),  # `rouge` ends a sentence at the decimal point
        ],
    )  # fmt: skip
    def test_by_hand(self, prediction: str, reference: str, precision: float, recall: float) -> None:
        expected = 2 * precision * recall / (precision + recall + 1e-8)
        assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("prediction", ["", " \n", "...", "?!", "'\"'"])
    def test_no_words_score_nothing(self, prediction: str) -> None:
        assert rouge_l(prediction, "a cat") == 0 == rouge_l("a cat", prediction)

    def test_any_length(self) -> None:
        assert rouge_l("x y " * 1000, "x z " * 100) == pytest.approx(0.5)


class TestNormalise:
    def test_every_full_stop_goes(self) -> None:
        """The released call takes `re.UNICODE`, 32, for the number of stops to remove."""
        assert "." not in normalise("a. " * 40)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("It is 3.", "it is 3"),
            ("0.5 or .5", "0.5 or .5"),
            ("well-known", "well known"),
            ("well-known -", "wellknown"),  # beside a space somewhere: closed up everywhere
            ("1,000 well-known", "1000 wellknown"),
            ("'It is'", "it is"),
            ("{Image_B}", "image b"),
        ],
    )
    def test_punctuation(self, text: str, expected: str) -> None:
        assert normalise(text) == expected


class TestChoices:
    @pytest.mark.parametrize(
        ("prediction", "choices", "index"),
        [
            ("It must be the dog.", ["a cat", "the dog", "a bird"], 1),
            ("cat", ["cat and dog and bird", "Cat!"], 1),  # the angle counts, not the overlap
            ("red blue", ["blue bird", "red bird"], 0),  # as near: the first
            ("blue red", ["red bird", "blue bird"], 0),
            ("a zebra", ["a cat", "the dog"], 0),  # "a" is no word
            ("", ["a cat", "the dog"], 0),
            ("C.", ["A", "B", "C"], 2),  # none has a word
            ("D", ["A", "B", "C"], 0),
        ],
    )
    def test_the_nearest(self, prediction: str, choices: list[str], index: int) -> None:
        assert multi_choice(prediction, choices) == index

    def test_is_right(self) -> None:
        assert is_right("The Dog", ["a cat", "the dog"], "The dog.") and not is_right("The dog", ["dog", "cat"], "cat")
        assert is_right("zebra", ["the dog", "a cat"], "the dog")  # no overlap: the first
        assert is_right("b", ["A", "B"], "B") and not is_right("D", ["A", "B"], "A")  # no word: only the same text

    @pytest.mark.parametrize(
        ("prediction", "is_image_b"),
        [
            ("Image B", True),
            ("image b: the dough", True),
            ("Image B, not image c", False),
            ("It is Image B", False),
            ("Image A", False),
            ("", False),
        ],
    )
    def test_images(self, prediction: str, is_image_b: bool) -> None:
        assert is_right_image(prediction, "Image B") is is_image_b

    def test_there_must_be_some(self) -> None:
        with pytest.raises(UserError, match="choices is empty"):
            multi_choice("a cat", [])


class TestCategories:
    def test_the_published_tasks(self) -> None:
        assert [len(tasks) for tasks in CATEGORIES.values()] == [2, 5, 4, 4, 4, 3, 9]
        assert len(QUESTION_TYPES) == 31 and len(set(QUESTION_TYPES) - set(FULL_ONLY)) == 29
        assert [*QUESTION_TYPES.values()] == ["open-ended"] * 11 + ["multi-choice"] * 20

    def test_means_of_what_is_given(self) -> None:
        scores = {"ALFRED": 0.25, "MMCoQA": 0.5, "WebQA": 0.5, "TQA": 0.25, "MMQA": 0.0, "VizWiz": 1.0}
        assert category_scores(scores) == {"Dial": 37.5, "KGQA": 25, "MultiImg": 100}
        assert category_scores(scores | {"ManyModalQA": 0.25})["KGQA"] == 25
        assert category_scores({}) == {}

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ({"SlideQA": 0.5}, "task is 'SlideQA'; must be one of DEMON's, such as SlideVQA"),
            ({"VIST": 37.5}, r"score of VIST is 37.5; must be within \[0, 1\]"),
            ({"VIST": float("nan")}, "score of VIST is nan"),
        ],
    )
    def test_refuses(self, scores: dict[str, float], message: str) -> None:
        with pytest.raises(UserError, match=message):
            category_scores(scores)


class TestTask:
    def test_what_is_asked(self, tmp_path: Path) -> None:
        folder = write_task(
            tmp_path, "SlideVQA", [record(7), record(9, context="{table#2}Is {image#1}, then {image#2}?")]
        )
        for data in (folder, folder / "core" / "core.json"):
            first, second = load_task("demon", str(data), None, tmp_path).samples
            suffix = "Choice list:['a red cat', 'a blue dog']. Your answer is:"
            assert first.question == f"Look closely. <image><image>What is it?{suffix}"
            assert (first.id, first.reference, [file.name for file in first.images]) == (
                "7", "a blue dog", ["0.png", "1.png"],
            )  # fmt: skip
            assert second.question.startswith("Look closely. <image>Is <image>, then <image>?Choice list")
            assert [file.name for file in second.images] == ["1.png", "0.png", "1.png"]  # the released runner: in order

    def test_shifts_leave_the_choices_alone(self, tmp_path: Path) -> None:
        text = Demon(write_task(tmp_path, "SlideVQA", [record()])).samples[0].question
        spans = [text[start:end] for start, end in protected_spans(text)]
        assert "Choice list:['a red cat', 'a blue dog']. Your answer is:" in spans

    def test_tables_numbered_apart_from_images(self, tmp_path: Path) -> None:
        context = "{table#1}Is {image#1}, in {table#1}, or {image#2}?"
        one = record(context=context, images_path=["0.png", "1.png", "2.png"])
        files = Demon(write_task(tmp_path, "ManyModalQA", [one])).samples[0].images
        assert [file.name for file in files] == ["0.png", "1.png", "0.png", "2.png"]

    def test_numbers_are_texts(self, tmp_path: Path) -> None:
        task = Demon(write_task(tmp_path, "Fashion200K", [record(choice_list=[3, 4], response=4)]))
        assert "Choice list:['3', '4']. Your" in task.samples[0].question and task.score({"0": "4"})["accuracy"] == 100

    @pytest.mark.parametrize(("name", "task"), [("Flintstones", "FlintstonesSV"), ("DiDemoSV", "DiDeMoSV")])
    def test_names_of_the_descriptions(self, name: str, task: str, tmp_path: Path) -> None:
        assert Demon(write_task(tmp_path, name, [record(choice_list=None)], question_type="open-ended")).name == task

    def test_images_without_places_stand_first(self, tmp_path: Path) -> None:
        task = Demon(write_task(tmp_path, "VIST", [record(context="Tell.", choice_list=None)]))
        assert task.samples[0].question == "<image>\n<image>\nLook closely. Tell."

    def test_alfred_whose_file_names_no_type_of_question(self, tmp_path: Path) -> None:
        task = Demon(write_task(tmp_path, "ALFRED", [record(choice_list=None)], question_type=""))
        assert task.headline == "rouge_l" and task.score({"0": "a blue cat"}) == {"rouge_l": pytest.approx(200 / 3)}
        assert task.worth(task.samples[0], "a blue cat") == pytest.approx(200 / 3)

    @pytest.mark.parametrize("name", ["RecipeQA_VisualCloze", "recipeqa-RecipeQA_VisualCloze"])
    def test_choices_that_are_images(self, name: str, tmp_path: Path) -> None:
        """Which the released script scores by TF-IDF, as it knows the second name only."""
        context = "{image#1} UNKNOWN\nChoice List:['Image A: {image#2}', 'Image B: {image#3}']"
        paths = ["0.png", "1.png", "2.png"]
        one = record(context=context, choice_list=None, images_path=paths, response="Image B")
        task = Demon(write_task(tmp_path, name, [one]))
        said = ("Image B", "Image B or Image A", "B")
        assert [task.score({"0": each}) for each in said] == [{"accuracy": 100}, {"accuracy": 0}, {"accuracy": 0}]

    def test_another_task_in_the_layout(self, tmp_path: Path) -> None:
        task = Demon(write_task(tmp_path, "Comics", [record()], question_type="multi-choice"))
        assert task.score({"0": "the dog"}) == {"accuracy": 100}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"id": "7"}, 'record 1: `sample_id` is "7"; must be an integer'),
            ({"id": True}, "`sample_id` is true; must be an integer"),
            ({"sample_id": None}, "`sample_id` is missing; must be an integer"),
            ({"id": 0}, "`sample_id` is 0, as in "),
            ({"task_instruction_id": 2}, "`task_instruction_id` is 2; must be within [0, 2)"),
            ({"task_instruction_id": -1}, "`task_instruction_id` is -1; must be within [0, 2)"),
            ({"task_instance": 3}, "`task_instance` is 3; must be an object"),
            ({"context": " "}, '`context` is " "; must be text'),
            ({"images_path": ["0.png", "5.png"]}, 'image "5.png" is missing'),
            ({"images_path": ["0.png", "../core.json"]}, "must stay inside the image folder"),
            ({"images_path": ["0.png", "/etc/hosts"]}, "is an absolute path"),
            ({"images_path": [0]}, "`images_path` is [0]; must be a list of texts"),
            ({"images_path": ["0.png"]}, "the text has places for images [1, 2] and `images_path` has 1"),
            ({"context": "{image#2}What?"}, "the text has places for images [2] and `images_path` has 2"),
            ({"context": "{image#0}{image#1}{image#2}What?"}, "the text has places for images [0, 1, 2] and"),
            ({"choice_list": None}, "`choice_list` is missing; must be a list of texts"),
            ({"context": "{image#1}{table#3}What?"}, "the text has places for images [1, 3] and `images_path` has 2"),
            ({"context": "{image#0}{table#7}What?"}, "the text has places for images [0, 7] and `images_path` has 2"),
            ({"choice_list": []}, "`choice_list` is []; must be"),
            ({"choice_list": ["a", "\ud800"]}, "`choice_list` has half a character at 0"),
            ({"response": "a cat"}, '`response` is "a cat"; must be of ["a red cat", "a blue dog"]'),
            ({"response": None}, "`response` is missing; must be text"),
        ],
    )
    def test_refuses_a_record(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = write_task(tmp_path, "SlideVQA", [record(0), record(**{"id": 1, **change})])
        with pytest.raises(UserError) as caught:
            Demon(folder)
        assert f"{folder / 'core' / 'core.json'}, record 1: " in str(caught.value) and message in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "metadata", "message"),
        [
            ("SlideVQA", {"question_type": "essay"}, 'is "essay"; must be "multi-choice", as SlideVQA is'),
            ("VIST", {"question_type": "multi-choice"}, 'is "multi-choice"; must be "open-ended", as VIST is'),
            ("Comics", {"question_type": ""}, 'is ""; must be "open-ended" or "multi-choice"'),
            ("Comics", {"question_type": None}, 'is missing; must be "open-ended" or "multi-choice"'),
            ("SlideVQA", {"task_instruction": []}, "`task_instruction` is []; must be a list of texts"),
            ("SlideVQA", {"dataset": 3}, "`dataset` is 3; must be text"),
        ],
    )
    def test_refuses_metadata(self, name: str, metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = write_task(tmp_path, name, [record()], **metadata)
        with pytest.raises(UserError) as caught:
            Demon(folder)
        assert f"{folder / 'core' / 'core.json'}, metadata: " in str(caught.value) and message in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "core.json cannot be read: Expecting"),
            ("[]", r"core.json holds \[\]; must be an object of metadata and data"),
            ("{}", "core.json: `metadata` is missing; must be an object"),
        ],
    )
    def test_refuses_a_file(self, text: str, message: str, tmp_path: Path) -> None:
        folder = write_task(tmp_path, "SlideVQA", [record()])
        (folder / "core" / "core.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Demon(folder)
        shutil.rmtree(folder / "core")
        with pytest.raises(UserError, match=r"core.json cannot be read: No such file"):
            Demon(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tasks: by ROUGE-L, by TF-IDF, by image choice."""
    root = tmp_path / "i4"
    texts = [record(each, f"{{image#1}}{{image#2}}{'And then? ' * each}", choice_list=None) for each in range(5)]
    write_task(root, "ALFRED", texts, question_type="")
    write_task(root, "SlideVQA", [record(4), record(2, response="a red cat")])
    image = {"response": "Image B", "choice_list": None}
    write_task(root, "COMICS_Panel", [record(0, "{image#1} Image A: {image#2}", **image)])
    return root


SETTINGS: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 3, "workers": 0}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What models were loaded and which samples were asked."""
    found: dict[str, list[Any]] = {"models": [], "asked": []}
    ask, load_tuned = vittle.evaluation.ask, vittle.evaluation.load_tuned

    def counted_ask(model: Any, processor: Any, batches: Any, *rest: Any) -> Iterator[Any]:
        found["asked"] += [sample.id for batch in batches for sample in batch]
        return ask(model, processor, batches, *rest)

    def counted_load(path: str, *rest: Any) -> Any:
        found["models"].append(path)
        return load_tuned(path, *rest)

    monkeypatch.setattr(vittle.evaluation, "ask", counted_ask)
    monkeypatch.setattr(vittle.evaluation, "load_tuned", counted_load)
    return found


class TestRun:
    def test_the_benchmarks_own_files(self, data: Path, tmp_path: Path, seen: dict[str, list[Any]]) -> None:
        output = tmp_path / "out"
        found = run(data, str(ALIGNED), output, **SETTINGS)
        assert list(found["tasks"]) == ["ALFRED", "COMICS_Panel", "SlideVQA"] and len(seen["models"]) == 1
        assert json.loads((output / "demon.json").read_text()) == found
        for name, each in found["tasks"].items():
            predictions, result, scores = (
                json.loads((output / name / file).read_text()) for file in ("pred.json", "eval.json", "eval_score.json")
            )
            task = Demon(data / name)
            assert [p["sample_id"] for p in predictions] == [int(sample.id) for sample in task.samples]
            assert all(p.keys() == {"sample_id", "pred_response", "gt_response"} for p in predictions)
            assert [p["gt_response"] for p in predictions] == [sample.reference for sample in task.samples]
            metric = "Rouge-L f" if name == "ALFRED" else "Accuracy"
            assert result == {metric: each["score"]} and len(scores) == each["samples"]
            answers = {str(p["sample_id"]): p["pred_response"] for p in predictions}
            assert 100 * each["score"] == pytest.approx(task.score(answers)[task.headline])
            assert [s["id"] for s in scores] == list(answers)
            assert all(re.fullmatch(r"[01]|0\.\d{1,3}", s["score"]) for s in scores)
        assert found["categories"] == {
            "Dial": 100 * found["tasks"]["ALFRED"]["score"],
            "Cloze": 100 * found["tasks"]["COMICS_Panel"]["score"],
            "TextRich": 100 * found["tasks"]["SlideVQA"]["score"],
        }
        before = contents(output / "ALFRED")
        assert score(data, output) == found and contents(output / "ALFRED") == before

    def test_goes_on(self, data: Path, tmp_path: Path, seen: dict[str, list[Any]]) -> None:
        output = tmp_path / "out"
        run(data, str(ALIGNED), output, tasks=["ALFRED"], **SETTINGS)
        assert sorted(seen["asked"]) == ["0", "1", "2", "3", "4"]
        whole, answers = contents(output), output / "ALFRED" / "answers" / "clean.jsonl"
        lines = whole[answers].splitlines(keepends=True)
        answers.write_bytes(b"".join(lines[:4]) + lines[4][:9])
        for file in ("demon.json", "demon.md", "ALFRED/pred.json", "ALFRED/eval.json", "ALFRED/eval_score.json"):
            (output / file).unlink()
        seen["asked"].clear()
        run(data, str(ALIGNED), output, tasks=["ALFRED"], **SETTINGS)
        assert seen["asked"] == [json.loads(lines[4])["id"]] and contents(output) == whole
        seen["models"].clear()
        run(data, str(ALIGNED), output, tasks=["ALFRED"], **SETTINGS)
        assert not seen["models"] and contents(output) == whole
        with pytest.raises(UserError, match="holds another evaluation: its batch_size was 2, now it is 3"):
            run(data, str(ALIGNED), output, tasks=["ALFRED"], **SETTINGS | {"batch_size": 3})
        assert contents(output) == whole

    def test_a_broken_image_scores_nothing(self, data: Path, tmp_path: Path) -> None:
        """Though an empty answer is nearest to the first choice, which is one sample's reference."""
        image, output = data / "SlideVQA" / "core" / "images" / "0.png", tmp_path / "out"
        image.write_bytes(image.read_bytes()[:60])
        found = run(data, str(ALIGNED), output, tasks=["SlideVQA"], **SETTINGS)
        assert json.loads((output / "SlideVQA" / "eval.json").read_text()) == {"Accuracy": 0}
        scores = json.loads((output / "SlideVQA" / "eval_score.json").read_text())
        assert scores == [{"id": "4", "score": "0"}, {"id": "2", "score": "0"}]
        assert page(found).count(str(image)) == 1 and "2 samples have broken images and score 0" in page(found)
        before = contents(output)
        assert score(data, output) == found and contents(output) == before

    def test_another_model_is_refused_before_any_question(
        self, data: Path, tmp_path: Path, seen: dict[str, list[Any]]
    ) -> None:
        other, output = tmp_path / "other", tmp_path / "out"
        shutil.copytree(ALIGNED, other)
        (other / "config.json").write_text((other / "config.json").read_text() + " ")
        run(data, str(ALIGNED), output, tasks=["SlideVQA"], **SETTINGS)
        before = contents(output)
        seen["asked"].clear()
        with pytest.raises(UserError, match=r"SlideVQA holds another evaluation: its model was .*, now it is"):
            run(data, str(other), output, **SETTINGS)
        assert not seen["asked"]
        assert {path: text for path, text in contents(output).items() if path.name != ".lock"} == {
            path: text for path, text in before.items() if path.name != ".lock"
        }
        run(data, str(other), tmp_path / "there", tasks=["ALFRED"], **SETTINGS)
        shutil.copytree(tmp_path / "there" / "ALFRED", output / "ALFRED", dirs_exist_ok=True)
        with pytest.raises(UserError, match=r"predictions .* are of models .*; must be of one"):
            score(data, output)

    def test_a_bad_task_stops_it_before_any_question(
        self, data: Path, tmp_path: Path, seen: dict[str, list[Any]]
    ) -> None:
        write_task(data, "VizWiz", [record("one")])
        with pytest.raises(UserError, match=r'VizWiz.core.core.json, record 0: `sample_id` is "one"'):
            run(data, str(ALIGNED), tmp_path / "out", **SETTINGS)
        assert not seen["models"] and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("name", "folder", "tasks", "message"),
        [
            ("SlideVQA", "", ["SlideQA"], "task 'SlideQA' is not in data .*; must be such as SlideVQA"),
            ("SlideVQA", "", ["../SlideVQA"], "task '../SlideVQA' is not in data"),
            ("Slides", "", [], "task is 'Slides'; must be one of DEMON's, such as SlideVQA"),
            ("SlideVQA", "again", [], "SlideVQA and .*again are both SlideVQA; name one of them as a task"),
        ],
    )
    def test_which_tasks(
        self, data: Path, tmp_path: Path, name: str, folder: str, tasks: list[str], message: str
    ) -> None:
        write_task(data, name, [record()], folder)
        with pytest.raises(UserError, match=message):
            run(data, str(ALIGNED), tmp_path / "out", tasks=tasks, **SETTINGS)
        with pytest.raises(UserError, match=r"has no TASK.core.core.json; must be DEMON's folder"):
            run(tmp_path / "nowhere", str(ALIGNED), tmp_path / "out", **SETTINGS)


class TestPredictions:
    ANSWERS: ClassVar = {
        "SlideVQA": {4: "The dog is blue.", 2: "A dog?"},
        "ALFRED": {0: "a blue dog", 1: "a blue cat", 2: "", 3: "zebra", 4: "dog"},
    }

    @pytest.fixture
    def predictions(self, tmp_path: Path) -> Path:
        for name, answers in self.ANSWERS.items():
            (tmp_path / "made" / name).mkdir(parents=True)
            made = [{"sample_id": id, "pred_response": text, "gt_response": "?"} for id, text in answers.items()]
            (tmp_path / "made" / name / "pred.json").write_text(json.dumps(made[::-1]))
        return tmp_path / "made"

    def test_by_hand(self, data: Path, predictions: Path) -> None:
        found = score(data, predictions)
        assert json.loads((predictions / "SlideVQA" / "eval.json").read_text()) == {"Accuracy": 0.5}
        scores = json.loads((predictions / "SlideVQA" / "eval_score.json").read_text())
        assert scores == [{"id": "4", "score": "1"}, {"id": "2", "score": "0"}]
        scores = json.loads((predictions / "ALFRED" / "eval_score.json").read_text())
        assert [each["score"] for each in scores] == ["1.0", "0.667", "0.0", "0.0", "0.5"]
        mean = (1 + 2 / 3 + 0 + 0 + 1 / 2) / 5
        assert json.loads((predictions / "ALFRED" / "eval.json").read_text()) == {"Rouge-L f": pytest.approx(mean)}
        assert found["categories"] == {"Dial": pytest.approx(100 * mean), "TextRich": 50}  # each from its own tasks
        assert (predictions / "demon.md").read_text().strip() == page(found)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda made: made[1:], "has 4 predictions; must have 5, one for each sample"),
            (lambda made: [*made[1:], made[1]], "record 4: `sample_id` is 3, which stands twice; must be each"),
            (lambda made: [*made[1:], made[0] | {"sample_id": 9}], "`sample_id` is 9, which no sample has"),
            (lambda made: [*made[1:], made[0] | {"sample_id": "4"}], '`sample_id` is "4"; must be an integer'),
            (lambda made: [*made[1:], made[0] | {"pred_response": None}], "`pred_response` is null; must be text"),
            (lambda made: [*made[1:], {"sample_id": 4}], "`pred_response` is missing; must be text"),
            (lambda made: {"data": made}, "must be a list of records"),
        ],
    )
    def test_refuses(self, data: Path, predictions: Path, change: Callable[[list[Any]], Any], message: str) -> None:
        file = predictions / "ALFRED" / "pred.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        (predictions / "SlideVQA" / "eval.json").write_text("precious")
        before = contents(predictions)
        with pytest.raises(UserError) as caught:
            score(data, predictions)
        assert str(file) in str(caught.value) and message in str(caught.value) and contents(predictions) == before

    def test_refuses_a_folder(self, data: Path, predictions: Path) -> None:
        with pytest.raises(UserError, match=r"has no TASK/pred.json; must be a folder with such files"):
            score(data, data)
        with pytest.raises(UserError, match=r"COMICS_Panel.pred.json cannot be read: No such file"):
            score(data, predictions, tasks=["COMICS_Panel"])
        shutil.rmtree(data / "SlideVQA")
        with pytest.raises(UserError, match="task 'SlideVQA' is not in data"):
            score(data, predictions)


def test_the_table_fits(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {
        name: {"category": category, "metric": "accuracy", "samples": 91479, "score": 1.0}
        for category, tasks in CATEGORIES.items()
        for name in tasks
    }
    whole = {name: each["score"] for name, each in results.items()}
    text = page({"model": None, "tasks": results, "categories": category_scores(whole)})
    assert max(map(len, text.splitlines())) <= 80 and text.splitlines()[-1].split() == [
        "|", "tasks", *" | 2/2 | 5/5 | 4/4 | 4/4 | 4/4 | 3/3 | 9/9 |".split()
    ]  # fmt: skip
    results.pop("Gibson")
    assert "8/8" in page({"model": None, "tasks": results, "categories": {}})
    (tmp_path / "made" / "SlideVQA").mkdir(parents=True)
    (tmp_path / "made" / "SlideVQA" / "pred.json").write_text("[]")
    arguments = ["demon", "--data", str(data), "--predictions", str(tmp_path / "made")]
    assert main(arguments) == 2 and "has 0 predictions; must have 2" in capsys.readouterr().err
    assert main([*arguments, "--output", "x"]) == 2 and "--model needs --output" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data.rename("demon-core")
    Path("runs").mkdir()
    for name in ("plain", "vittle"):
        Path("runs", name).symlink_to(ALIGNED)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.strip().splitlines()]
    assert [command[0] for command in commands] == ["demon", "demon", "evaluate", "evaluate", "compare"]
    for command in commands:
        asks = ["--max-new-tokens", "2", "--workers", "0"] if "--model" in command else []
        assert main(command + asks) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert told.count("| MultiImg |") == 2 and "accuracy" in told
    assert all(name in text for name in (*CATEGORIES, *QUESTION_TYPES))
