"""One of DEMON's tasks, in the benchmark's own layout: texts with images and tables in between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vittle.data.lines import Record, integer_of, object_of, read_json, records_of, text_of, texts_of
from vittle.data.llava import MARKER
from vittle.errors import UserError, shown
from vittle.metrics import demon
from vittle.tasks.task import Counts, Sample, Task, Values, share, with_images

CORE = Path("core", "core.json")
"""In the folder of a task."""

_PLACE = re.compile(r"\{(image|table)#(\d{1,4000})\}")


class Demon(Task):
    """ROUGE-L or accuracy, by the task's own type of question, as :mod:`vittle.metrics.demon` has them.

    A question is the record's instruction, its context and, where it has choices, `Choice list:['a', 'b']. Your answer
    is:`, put together without spaces as in the released runner. Each `{image#k}` or `{table#k}` is the k-th of
    `images_path`; where images and tables are numbered apart, they follow one another there as they do in the text;
    where there are none, the images stand before the text. Numbers as choices and responses are texts.

    Args:
        data: the task's folder, which holds `core/core.json` and `core/images`; or such a `core.json`.

    Raises:
        UserError: the file or a record is malformed, an id stands twice, or an image is missing or outside the folder.
    """

    max_new_tokens = 300

    def __init__(self, data: Path) -> None:
        path = data / CORE if data.is_dir() else data
        found = read_json(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} holds {shown(found)}; must be an object of metadata and data")
        metadata, place = object_of(found, "metadata", str(path)), f"{path}, metadata"
        name = text_of(metadata, "dataset", place)
        self.name = demon.RELEASED_NAMES.get(name, name)
        self.is_open_ended = _question_type(metadata, self.name, place) == "open-ended"
        self.headline = "rouge_l" if self.is_open_ended else "accuracy"
        self.choices: dict[str, list[str]] = {}
        instructions = texts_of(metadata, "task_instruction", place)
        super().__init__(self._samples(found.get("data"), instructions, path))

    def score_of(self, sample: Sample, answer: str) -> float:
        """Of one answer, in [0, 1]."""
        if self.is_open_ended:
            return demon.rouge_l(answer, sample.reference)
        if self.name in demon.IMAGE_CHOICE:
            return demon.is_right_image(answer, sample.reference)
        return demon.is_right(answer, self.choices[sample.id], sample.reference)

    def count(self, sample: Sample, answer: str) -> Counts:
        """The answer's score."""
        return {"asked": 1, "score": self.score_of(sample, answer)}

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """The mean of the scores."""
        return {self.headline: share(totals["score"], totals["asked"])}

    def _samples(self, data: object, instructions: list[str], path: Path) -> Iterator[Sample]:
        places: dict[int, str] = {}
        for place, record in records_of(data, path):
            id = integer_of(record, "sample_id", place)
            if id in places:
                raise UserError(f"{place}: `sample_id` is {id}, as in {places[id]}; must stand once")
            places[id] = place
            yield self._sample(str(id), record, instructions, path.parent / "images", place)

    def _sample(self, id: str, record: Record, instructions: list[str], images: Path, place: str) -> Sample:
        record = _with_texts(record, "response")
        instance = _with_texts(object_of(record, "task_instance", place), "choice_list")
        number = integer_of(record, "task_instruction_id", place)
        if not 0 <= number < len(instructions):
            raise UserError(f"{place}: `task_instruction_id` is {number}; must be within [0, {len(instructions)})")
        text = instructions[number] + text_of(instance, "context", place)
        if has_choices := "choice_list" in instance or not (self.is_open_ended or self.name in demon.IMAGE_CHOICE):
            self.choices[id] = texts_of(instance, "choice_list", place)
            listed = "', '".join(self.choices[id])
            text += f"Choice list:['{listed}']. Your answer is:"
        reference = text_of(record, "response", place)
        if has_choices and demon.normalise(reference) not in map(demon.normalise, self.choices[id]):
            raise UserError(f"{place}: `response` is {shown(reference)}; must be of {shown(self.choices[id])}")
        question, files = with_images(*_placed(text, instance, place), images.resolve(), place)
        return Sample(id, question, files, reference)


def _question_type(metadata: Mapping[str, Any], name: str, place: str) -> str:
    """As the file says; or, where that is empty as in ALFRED's, as the benchmark's table does."""
    said, known = metadata.get("question_type"), demon.QUESTION_TYPES.get(name)
    if said not in ([known, ""] if known else ["open-ended", "multi-choice"]):
        found = "missing" if said is None else shown(said)
        must = f'"{known}", as {name} is' if known else '"open-ended" or "multi-choice"'
        raise UserError(f"{place}: `question_type` is {found}; must be {must}")
    return known or str(said)


def _placed(text: str, instance: Mapping[str, Any], place: str) -> tuple[str, list[str]]:
    """The text with markers in place of what stands for images, and the path of each."""
    paths = texts_of(instance, "images_path", place)
    places = [(kind, int(number)) for kind, number in _PLACE.findall(text)]
    numbers, apart = {number for _, number in places}, list(dict.fromkeys(places))
    of_kinds = [[number for each, number in apart if each == kind] for kind in ("image", "table")]
    are_counted = all(each == list(range(1, len(each) + 1)) for each in of_kinds)
    if not places:
        files = paths
    elif numbers == set(range(1, len(paths) + 1)):
        files = [paths[number - 1] for _, number in places]
    elif are_counted and len(apart) == len(paths):
        files = [paths[apart.index(each)] for each in places]
    else:
        raise UserError(
            f"{place}: the text has places for images {sorted(numbers)} and `images_path` has {len(paths)}; each "
            "must have the other"
        )
    return _PLACE.sub(MARKER, text), files


def _with_texts(record: Record, name: str) -> Record:
    """The record with numbers in a field as texts, as the released runner writes them."""

    def text(value: object) -> object:
        if isinstance(value, list):
            return [text(each) for each in value]
        return str(value) if type(value) in (int, float) else value

    return record | {name: text(record[name])} if name in record else record
