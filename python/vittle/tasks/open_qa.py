"""LLaVA-Bench: open questions, whose answers a judge who sees no image holds against reference answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vittle.data.lines import Record, id_of, read_lines, text_of
from vittle.errors import UserError, shown
from vittle.judge import Verdict
from vittle.tasks.task import Counts, Sample, Task, Values, share, with_images

LAYOUTS = {
    "in the wild": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"),
    "COCO": ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl"),
}
"""The files of questions, of contexts and of reference answers."""


class LlavaBench(Task):
    """The relative score is 100 times the sum of the model's scores over the sum of the reference answers'.

    It is not a mean of ratios, and the higher the better; over 100, the judge prefers the model to the reference. The
    90 questions of COCO are about 30 images, three an image: one cluster.

    Args:
        data: the benchmark's folder, in either of :data:`LAYOUTS`.
        images: folder of the images; COCO's own names, `COCO_val2014_....jpg`, are found too.

    Raises:
        UserError: a file is missing, a record is malformed, or one has no context, reference answer or image.
    """

    headline = "relative_score"
    max_new_tokens = 1024
    is_judged = True

    def __init__(self, data: Path, images: Path) -> None:
        found = [files for files in LAYOUTS.values() if (data / files[0]).is_file()]
        if not found:
            names = " nor ".join(files[0] for files in LAYOUTS.values())
            raise UserError(f"{data} has neither {names}; must be the folder of LLaVA-Bench")
        questions, contexts, references = (data / name for name in found[0])
        super().__init__(_samples(questions, _contexts(contexts), _references(references), images.resolve()))

    def count(self, sample: Sample, answer: Verdict) -> Counts:
        """Both scores; none of a verdict that the judge did not give."""
        if not self.is_scored(answer):
            return {"asked": 1}
        assert answer.model is not None and answer.reference is not None
        return {"asked": 1, "judged": 1, "model": answer.model, "reference": answer.reference}

    def is_scored(self, answer: Verdict) -> bool:
        """Whether the judge gave scores."""
        return answer.model is not None and answer.reference is not None

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """The relative score, both means, and the share of questions that the judge gave scores for."""
        judged = totals["judged"]
        return {
            "relative_score": share(totals["model"], totals["reference"]),
            "model_score": share(totals["model"], judged) / 100,
            "reference_score": share(totals["reference"], judged) / 100,
            "judged": share(judged, totals["asked"]),
        }


def _samples(
    questions: Path, contexts: Mapping[str, str], references: Mapping[str, str], images: Path
) -> Iterator[Sample]:
    for place, record in read_lines(questions):
        id, image = id_of(record, "question_id", place), text_of(record, "image", place)
        for what, known, name in (("context", contexts, image), ("reference answer", references, id)):
            if name not in known:
                raise UserError(f"{place}: there is no {what} of {shown(name)}")
        file = image if (images / image).exists() else f"COCO_val2014_{image}"
        question, files = with_images(text_of(record, "text", place), [file], images, place)
        group = text_of(record, "category", place)
        yield Sample(id, question, files, references[id], group, cluster=image, context=contexts[image])


def _contexts(path: Path) -> dict[str, str]:
    return {text_of(record, "image", place): _context(record, place) for place, record in read_lines(path)}


def _context(record: Record, place: str) -> str:
    """A caption; or, of COCO, captions and the boxes of objects, each corner in [0, 1]."""
    if "captions" not in record:
        return text_of(record, "caption", place)
    try:
        captions: list[str] = [str(each) for each in record["captions"]]
        boxes = [f"{each['category']}: {_box(each['bbox'])}" for each in record["instances"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: `captions` and `instances` (category, bbox) must be lists: {error!r}") from error
    return "\n".join([*captions, "", *boxes])


def _box(numbers: Any) -> list[float]:
    return [round(float(number), 3) for number in numbers]


def _references(path: Path) -> dict[str, str]:
    return {id_of(record, "question_id", place): text_of(record, "text", place) for place, record in read_lines(path)}
