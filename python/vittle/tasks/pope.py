"""POPE's own files: a question on each line, about one object in one image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vittle.data.lines import id_of, read_lines, text_of
from vittle.errors import UserError, shown
from vittle.metrics import pope
from vittle.tasks.task import Counts, Sample, Task, Values, with_images

SUFFIX = "Answer the question using a single word or phrase."
_FILE = re.compile(r".*pope_(\w+)\.json")


class Pope(Task):
    """Yes or no, in the groups random, popular and adversarial; the questions of an image, six in each, are a cluster.

    Args:
        data: a file `*pope_random.json` (or popular, adversarial: question_id, image, text, label); a folder of
            them; or LLaVA's `llava_pope_test.jsonl` (question_id, image, text, category), whose labels are
            those files' line by line, in its folder or in `coco` beside it.
        images: folder that the image paths start from.
        rule: how answers are read, of :data:`vittle.metrics.pope.RULES`.

    Raises:
        UserError: a file is missing, a record is malformed, or labels and questions do not match.
    """

    headline = "accuracy"

    def __init__(self, data: Path, images: Path, rule: str = "released") -> None:
        pope.parse_answer("", rule)
        self.rule = rule
        super().__init__(_questions(data, images.resolve()) if data.suffix == ".jsonl" else _labelled(data, images))

    def count(self, sample: Sample, answer: str) -> Counts:
        """A cell of the confusion table."""
        return pope.count(pope.parse_answer(answer, self.rule), sample.reference)

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """Accuracy, precision, recall, F1 and the share of yes."""
        return {name: 100 * rate for name, rate in pope.rates(totals).items()}


def _labelled(data: Path, images: Path) -> Iterator[Sample]:
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    matches = [(path, match[1]) for path in files if (match := _FILE.fullmatch(path.name))]
    if not matches:
        raise UserError(f"{data} holds no file such as coco_pope_random.json; POPE's files end in pope_CATEGORY.json")
    for path, category in matches:
        for place, record in read_lines(path):
            yield _sample(record, category, images.resolve(), place, _label(record, place))


def _questions(data: Path, images: Path) -> Iterator[Sample]:
    labels: dict[str, Iterator[tuple[str, dict[str, str]]]] = {}
    for place, record in read_lines(data):
        category = text_of(record, "category", place)
        if category not in labels:
            name = f"coco_pope_{category}.json"
            found = [path for path in (data.parent / name, data.parent / "coco" / name) if path.is_file()]
            if not found:
                raise UserError(f"{place}: its labels, {name}, are neither in {data.parent} nor in its folder coco")
            labels[category] = read_lines(found[0])
        at, labelled = next(labels[category], ("", {}))
        if not labelled:
            raise UserError(f"{place}: the labels of {category} have ended; there must be one for each question")
        if text_of(labelled, "text", at) != text_of(record, "text", place).removesuffix(f"\n{SUFFIX}"):
            raise UserError(f"{place}: `text` is {shown(record['text'])}, and {at} asks {shown(labelled['text'])}")
        yield _sample(record, category, images, place, _label(labelled, at))


def _label(record: Mapping[str, str], place: str) -> str:
    label = text_of(record, "label", place)
    if label not in ("yes", "no"):
        raise UserError(f"{place}: `label` is {shown(label)}; must be yes or no")
    return label


def _sample(record: Mapping[str, str], category: str, images: Path, place: str, label: str) -> Sample:
    image = text_of(record, "image", place)
    text = text_of(record, "text", place).removesuffix(f"\n{SUFFIX}")
    question, files = with_images(f"{text}\n{SUFFIX}", [image], images, place)
    id = f"{category}/{id_of(record, 'question_id', place)}"
    return Sample(id, question, files, label, group=category, cluster=image)
