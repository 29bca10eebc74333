"""Every task on small files in its benchmark's own format: what is read, how it is scored, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from vittle import UserError
from vittle.judge import Verdict
from vittle.metrics.pope import parse_answer, score
from vittle.tasks import DigitScenes, load_task
from vittle.tasks.choice import parse as parse_choice
from vittle.tasks.mme import parse as parse_mme


def lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def load(name: str, data: Path, images: Path | None = None) -> Any:
    return load_task(name, str(data), None if images is None else str(images), data)


class TestPope:
    QUESTIONS: ClassVar = (
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
        {"question_id": 3, "image": "b.jpg", "text": "Is there a car in the image?", "label": "yes"},
    )
    SUFFIX = "\nAnswer the question using a single word or phrase."

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pictures(tmp_path / "images", "a.jpg", "b.jpg")
        for category in ("random", "popular"):
            lines(tmp_path / "coco" / f"coco_pope_{category}.json", self.QUESTIONS)
        return tmp_path

    def test_the_benchmarks_own_files(self, folder: Path) -> None:
        task = load("pope", folder / "coco", folder / "images")
        assert sorted(task.groups) == ["popular", "random"] and len(task.samples) == 6
        sample = task.by_id["random/1"]
        assert sample.question == f"<image>\nIs there a dog in the image?{self.SUFFIX}"
        assert (sample.reference, sample.cluster, sample.images[0].name) == ("yes", "a.jpg", "a.jpg")
        answers = {"random/1": "Yes.", "random/2": "Yes", "random/3": "No, there is none."}
        found = task.score(answers, "random")
        assert found == pytest.approx(
            {"accuracy": 100 / 3, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 200 / 3}
        )
        assert task.score(answers) == found

    def test_llavas_file_takes_labels_line_by_line(self, folder: Path) -> None:
        records = [
            {"question_id": q["question_id"], "image": q["image"], "text": q["text"] + self.SUFFIX, "category": c}
            for c in ("popular", "random")
            for q in self.QUESTIONS
        ]
        data = lines(folder / "llava_pope_test.jsonl", records)
        task = load("pope", data, folder / "images")
        assert [(s.id, s.reference) for s in task.samples][-2:] == [("random/2", "no"), ("random/3", "yes")]
        assert task.samples[0].question.count("Answer the question") == 1
        lines(data, [records[1], *records[1:]])
        with pytest.raises(UserError, match=r'line 1: `text` is "Is there a cat.*json, line 1 asks "Is there a dog'):
            load("pope", data, folder / "images")
        lines(data, [*records, records[0]])
        with pytest.raises(UserError, match="line 7: the labels of popular have ended"):
            load("pope", data, folder / "images")

    def test_strict_counts_what_is_neither_as_wrong(self, folder: Path) -> None:
        task = load("pope-strict", folder / "coco" / "coco_pope_random.json", folder / "images")
        found = task.score({"random/1": "There is a dog", "random/2": " NO. ", "random/3": "yes"})
        assert found == pytest.approx(
            {"accuracy": 200 / 3, "precision": 100, "recall": 50, "f1": 200 / 3, "yes_ratio": 100 / 3}
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": "maybe"}, 'line 1: `label` is "maybe"; must be yes or no'),
            ({"label": None}, "line 1: `label` is null; must be text"),
            ({"image": "c.jpg"}, 'line 1: image "c.jpg" is missing'),
            ({"image": "../a.jpg"}, "must stay inside the image folder"),
            ({"question_id": 2}, 'id "random/2" stands 2 times in the task'),
            ({"question_id": True}, "`question_id` is true; must be a string or an integer"),
            ({"text": " "}, '`text` is " "; must be text'),
        ],
    )
    def test_refuses(self, folder: Path, change: dict[str, Any], message: str) -> None:
        data = lines(folder / "coco_pope_random.json", [self.QUESTIONS[0] | change, *self.QUESTIONS[1:]])
        with pytest.raises(UserError) as caught:
            load("pope", data, folder / "images")
        assert message in str(caught.value)

    def test_rules(self) -> None:
        texts = ["No", "no, it is", "It is not.", "Yes. There is no cat.", "yes", "Nothing", "", "NO"]
        assert [parse_answer(text) for text in texts] == ["no", "no", "no", "yes", "yes", "yes", "yes", "yes"]
        strict = [parse_answer(text, rule="strict") for text in texts]
        assert strict == ["no", None, None, None, "yes", None, None, "no"]
        with pytest.raises(UserError, match="rule is 'loose'; must be one of released, strict"):
            parse_answer("", rule="loose")

    def test_score_against_scikit_learn(self) -> None:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        predictions, labels = ["yes", "no", "yes", "yes", "no"], ["yes", "yes", "no", "yes", "no"]
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predictions, pos_label="yes", average="binary"
        )
        assert score(predictions, labels) == pytest.approx(
            {
                "accuracy": accuracy_score(labels, predictions),
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "yes_ratio": 0.6,
            }
        )
        assert score(["no", "no"], ["no", "yes"])["f1"] == 0
        with pytest.raises(UserError, match="1 predictions and 2 labels"):
            score(["no"], ["no", "yes"])
        with pytest.raises(UserError, match=r'predictions\[0\] is "No"'):
            score(["No"], ["no"])


class TestMme:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        flat, nested = pictures(tmp_path / "existence", "1.jpg", "2.png"), tmp_path / "code_reasoning"
        (flat / "1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
        (flat / "2.txt").write_text("Is it?\tYes\nIs it not?\tNo\n\n")
        pictures(nested / "images", "3.png")
        (nested / "questions_answers_YN").mkdir()
        (nested / "questions_answers_YN" / "3.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
        return tmp_path

    def test_both_layouts_and_accuracy_plus(self, folder: Path) -> None:
        task = load("mme", folder)
        assert [sample.id for sample in task.samples][:2] == ["existence/1/1", "existence/1/2"]
        right = {sample.id: sample.reference for sample in task.samples}
        assert task.score(right) == {"accuracy": 100, "accuracy_plus": 100, "perception": 200, "cognition": 200}
        one_wrong = right | {"existence/1/1": "No"}
        found = task.score(one_wrong)
        assert found == pytest.approx(
            {"accuracy": 500 / 6, "accuracy_plus": 200 / 3, "perception": 75 + 50, "cognition": 200}
        )
        assert task.score(one_wrong, "existence")["accuracy"] == 75

    def test_rule_and_refusals(self, folder: Path) -> None:
        texts = ["Yes.", " yes, it", "No", "not", "It is yes", ""]
        assert [parse_mme(text) for text in texts] == ["Yes", "Yes", "No", "No", None, None]
        (folder / "existence" / "1.txt").write_text("Is it? Yes\n")
        with pytest.raises(UserError, match=r"1.txt, line 1 ends in \"\"; must be a question, a tab, and Yes or No"):
            load("mme", folder)
        (folder / "existence" / "1.jpg").unlink()
        with pytest.raises(UserError, match="there is no image 1 "):
            load("mme", folder)
        with pytest.raises(UserError, match="has none of MME's folders"):
            load("mme", pictures(folder / "empty"))


class TestChoice:
    RECORD: ClassVar = {
        "id": 7,
        "image": "a.png",
        "question": "Which?",
        "choices": ["cat", "dog"],
        "answer": "B",
        "category": "x",
    }

    def test_what_is_asked_and_scored(self, tmp_path: Path) -> None:
        pictures(tmp_path, "a.png")
        records = [self.RECORD, self.RECORD | {"id": 8, "image": None, "answer": 0, "context": "Hear this."}]
        data = tmp_path / "q.json"
        data.write_text(json.dumps(records))
        task = load("choice", data)
        suffix = "Answer with the option's letter from the given choices directly."
        assert task.samples[0].question == f"<image>\nWhich?\nA. cat\nB. dog\n{suffix}"
        assert task.samples[1].question.startswith("Hear this.\nWhich?") and not task.samples[1].images
        assert task.score({"7": "B. dog", "8": "I do not know"}) == {"accuracy": 50, "unread": 50}
        assert task.groups == ["x"]

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("B", "B"), ("(A)", "A"), ("B: the dog", "B"), ("The answer is B.", "B"), ("Answer: a", "A"),
            ("Dog.", "B"), ("cat", "A"), ("C", None), ("A dog is there", None), ("", None), ("Both", None),
            ("The answer is a dog.", None), ("Answer: a cat", None), ("B\nBecause it barks.", "B"), ("**B**", "B"),
            ("B is correct", "B"), ("(b)", "B"), ("b", "B"), ("Option B", "B"), ("The answer is (A), a cat.", "A"),
            ("I think so.\nAnswer: B", "B"), ("It is a", None),
        ],
    )  # fmt: skip
    def test_letters(self, text: str, letter: str | None) -> None:
        assert parse_choice(text, ["cat", "dog"]) == letter

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"choices": ["one"]}, '`choices` is ["one"]; must be a list of 2 to 26 texts'),
            ({"answer": "C"}, '`answer` is "C"; must be a letter from A to B'),
            ({"answer": 2}, "`answer` is 2; must be"),
            ({"answer": None}, "`answer` is missing"),
            ({"question": ""}, '`question` is ""; must be text'),
            ({"question": "<image> <image>"}, "2 <image> marker(s) and 1 image(s)"),
            ({"image": 3}, "`image` is 3; it must be a path"),
        ],
    )
    def test_refuses(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        pictures(tmp_path, "a.png")
        data = tmp_path / "q.json"
        data.write_text(json.dumps([self.RECORD | change]))
        with pytest.raises(UserError) as caught:
            load("choice", data)
        assert f"{data}, record 0: " in str(caught.value) and message in str(caught.value)


class TestLlavaBench:
    @pytest.fixture
    def wild(self, tmp_path: Path) -> Path:
        question = {"question_id": 0, "image": "001.jpg", "text": "What is it?", "category": "conv"}
        lines(tmp_path / "questions.jsonl", [question, question | {"question_id": 1, "category": "detail"}])
        lines(tmp_path / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A harbour."}])
        answers = [{"question_id": each, "text": f"Reference {each}.", "answer_id": "x"} for each in (0, 1)]
        lines(tmp_path / "answers_gpt4.jsonl", answers)
        pictures(tmp_path / "images", "001.jpg")
        return tmp_path

    def test_in_the_wild(self, wild: Path) -> None:
        task = load("llava-bench", wild, wild / "images")
        sample = task.by_id["1"]
        assert (sample.reference, sample.context, sample.group) == ("Reference 1.", "A harbour.", "detail")
        assert sample.cluster == "001.jpg" and task.is_judged
        found = task.score({"0": Verdict(6, 8), "1": Verdict(None, None, 3)})
        assert found == {"relative_score": 75, "model_score": 6, "reference_score": 8, "judged": 50}
        assert task.score({"0": Verdict(6, 8), "1": Verdict(9, 2)})["relative_score"] == 150

    def test_coco_has_captions_and_boxes_and_its_own_file_names(self, wild: Path) -> None:
        (wild / "questions.jsonl").rename(wild / "qa90_questions.jsonl")
        (wild / "answers_gpt4.jsonl").rename(wild / "qa90_gpt4_answer.jsonl")
        (wild / "images" / "001.jpg").rename(wild / "images" / "COCO_val2014_001.jpg")
        box = {"category": "boat", "bbox": [0.12345, 0.5, 1, 1]}
        context = {"id": "001", "image": "001.jpg", "captions": ["A boat.", "A sea."], "instances": [box]}
        lines(wild / "caps_boxes_coco2014_val_80.jsonl", [context])
        sample = load("llava-bench", wild, wild / "images").by_id["0"]
        assert sample.context == "A boat.\nA sea.\n\nboat: [0.123, 0.5, 1.0, 1.0]"
        assert sample.images[0].name == "COCO_val2014_001.jpg"

    def test_refuses(self, wild: Path) -> None:
        lines(wild / "answers_gpt4.jsonl", [{"question_id": 0, "text": "One."}])
        with pytest.raises(UserError, match=r'line 2: there is no reference answer of "1"'):
            load("llava-bench", wild, wild / "images")
        (wild / "questions.jsonl").unlink()
        with pytest.raises(UserError, match="has neither questions"):
            load("llava-bench", wild, wild / "images")


def test_digit_scenes_are_made_once(tmp_path: Path) -> None:
    task = DigitScenes(tmp_path, count=8)
    assert len(task.samples) == 8 and sorted(task.groups) == ["count", "presence", "sum", "which"]
    before = (tmp_path / "questions.json").stat().st_mtime_ns
    assert DigitScenes(tmp_path, count=8).samples == task.samples
    assert (tmp_path / "questions.json").stat().st_mtime_ns == before
    right = {sample.id: f" {sample.reference.upper()}." for sample in task.samples}
    assert task.score(right) == {"accuracy": 100}
    assert task.score(right | {task.samples[0].id: "?"}) == {"accuracy": 87.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("popes", "x"), "task is 'popes'; must be such as pope"),
        (("pope", None), "task pope needs --data"),
        (("pope", "nowhere"), "data is 'nowhere', which does not exist"),
        (("digits", "x"), "must be left out for digits"),
    ],
)
def test_which_task(arguments: tuple[str, str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_task(*arguments, None, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is [1]; must be an object"),
        ("", "the task has no samples"),
    ],
)
def test_a_file_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "coco_pope_random.json").write_text(text)
    reads: Callable[[], Any] = lambda: load("pope", tmp_path)  # noqa: E731
    with pytest.raises(UserError) as caught:
        reads()
    assert message in str(caught.value)
