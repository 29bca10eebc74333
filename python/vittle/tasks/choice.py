"""Multiple choice, in a plain JSON list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vittle.data.lines import id_of, read_list, text_of
from vittle.data.llava import image_names
from vittle.errors import UserError, shown
from vittle.tasks.task import Counts, Sample, Task, Values, share, with_images

SUFFIX = "Answer with the option's letter from the given choices directly."
_RULES = (
    re.compile(r"(?:[Oo]ption|[Cc]hoice)?\s*\(?([A-Z])(?:[).:,]|\s*$|\s+is\s)", re.MULTILINE),
    re.compile(r"\b[Aa]nswer(?: is|:)\s*(?:option|Option)?\s*\(?([A-Z])\b"),
    re.compile(r"(?:.*\b[Aa]nswer(?: is|:))?\s*\(?([a-z])\)?\.?\s*$"),
)
"""A letter that an answer begins with, one that it says, and a small one where nothing follows that it might belong to:
`The answer is a dog.` names no letter."""


class Choice(Task):
    """Records of id, question, choices (two to 26 texts) and answer (a letter, or an index from 0); image (a path or
    a list of them), context (text before the question) and category are optional.

    Raises:
        UserError: a record is malformed, or an image is missing.
    """

    headline = "accuracy"

    def __init__(self, data: Path, images: Path) -> None:
        self.choices: dict[str, list[str]] = {}
        super().__init__(self._sample(record, images.resolve(), place) for place, record in read_list(data))

    def count(self, sample: Sample, answer: str) -> Counts:
        """Right, wrong, or no letter at all."""
        letter = parse(answer, self.choices[sample.id])
        return {"asked": 1, "right": letter == sample.reference, "unread": letter is None}

    def metrics(self, totals: Mapping[str, Values]) -> dict[str, Values]:
        """Accuracy, and the share of answers that name no choice, which are wrong."""
        return {"accuracy": share(totals["right"], totals["asked"]), "unread": share(totals["unread"], totals["asked"])}

    def _sample(self, record: Mapping[str, Any], images: Path, place: str) -> Sample:
        id = id_of(record, "id", place)
        choices = record.get("choices")
        if not (isinstance(choices, list) and 2 <= len(choices) <= 26 and all(isinstance(c, str) for c in choices)):
            found = "missing" if choices is None else shown(choices)
            raise UserError(f"{place}: `choices` is {found}; must be a list of 2 to 26 texts")
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))
        before = f"{text_of(record, 'context', place)}\n" if record.get("context") else ""
        text = f"{before}{text_of(record, 'question', place)}\n{options}\n{SUFFIX}"
        try:
            names = image_names(record.get("image"))
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        question, files = with_images(text, names, images, place)
        self.choices[id] = choices
        group = text_of(record, "category", place) if record.get("category") else ""
        return Sample(id, question, files, _letter(record.get("answer"), len(choices), place), group)


def _letter(answer: object, count: int, place: str) -> str:
    letters = ascii_uppercase[:count]
    if type(answer) is int and 0 <= answer < count:
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    found = "missing" if answer is None else shown(answer)
    raise UserError(f"{place}: `answer` is {found}; must be a letter from A to {letters[-1]}, or an index from 0")


def parse(text: str, choices: list[str]) -> str | None:
    """The letter that an answer begins with or says (`The answer is B.`), or whose text it is; None: none of those."""
    letters, text = ascii_uppercase[: len(choices)], text.replace("*", "").strip()
    begins, says, small = _RULES
    for match in (begins.match(text), says.search(text), small.match(text)):
        if match and match[1].upper() in letters:
            return match[1].upper()
    plain = text.strip().rstrip(".").lower()
    same = [letter for letter, choice in zip(letters, choices, strict=True) if choice.strip().lower() == plain]
    return same[0] if same else None
