"""DEMON (Li et al., ICLR 2024): 31 tasks over interleaved images and text, scored by the published rules.

The rules are those of the benchmark's own script, evaluate.py of DCDmllm/Cheetah, without its bugs.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Literal

from vittle.errors import UserError

try:
    from rouge import Rouge
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity
except ModuleNotFoundError as error:
    raise UserError(f"{error.name} is not installed: pip install 'vittle-kernels[eval]'") from error

QuestionType = Literal["open-ended", "multi-choice"]

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "Dial": ("ALFRED", "MMCoQA"),
    "Story": ("AESOP", "PororoSV", "FlintstonesSV", "VIST", "DiDeMoSV"),
    "Rel": ("Spot-the-Diff", "CLEVR-Change", "IEdit", "Birds-to-Words"),
    "Cloze": ("COMICS_Dialogue", "COMICS_Panel", "RecipeQA_TextCloze", "RecipeQA_VisualCloze"),
    "KGQA": ("WebQA", "TQA", "MMQA", "ManyModalQA"),
    "TextRich": ("SlideVQA", "OCR-VQA", "DocVQA"),
    "MultiImg": (
        "Gibson", "nuScenes", "VISION", "Fashion200K", "MIT-States_PropertyCoherence", "MIT-States_StateCoherence",
        "RecipeQA_ImageCoherence", "NLVR2", "VizWiz",
    ),
}  # fmt: skip
"""The tasks of each category, in the order of the published table."""

QUESTION_TYPES: Mapping[str, QuestionType] = {
    task: "open-ended" if category in ("Dial", "Story", "Rel") else "multi-choice"
    for category, tasks in CATEGORIES.items()
    for task in tasks
}
"""Open-ended tasks are scored by ROUGE-L, the others by accuracy."""

FULL_ONLY = ("ManyModalQA", "Gibson")
"""Tasks that DEMON-Core leaves out."""

IMAGE_CHOICE = ("COMICS_Panel", "RecipeQA_VisualCloze", "RecipeQA_ImageCoherence")
"""Tasks whose choices are images, named in the context: `Image A` to `Image D`."""

RELEASED_NAMES: Mapping[str, str] = {
    "DiDemoSV": "DiDeMoSV",
    "Flintstones": "FlintstonesSV",
    "MultiModalQA": "MMQA",
    "nuscenes": "nuScenes",
    "recipeqa-RecipeQA_VisualCloze": "RecipeQA_VisualCloze",
}
"""What the released scripts, folders and descriptions call some tasks too."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_GROUPED_DIGITS = re.compile(r"\d,\d")
_IMAGES = ("image a", "image b", "image c", "image d")
_ROUGE = Rouge(metrics=["rouge-l"], stats=["f"])


def normalise(text: str) -> str:
    """The text as it is compared: in lower case, on one line, without punctuation, decimal points apart.

    A mark becomes a space; or nothing where it stands beside a space somewhere in the text, or digits are grouped by
    commas. The released pattern of full stops holds a mistyped look-behind that holds nothing back, and is left out
    here; its call removes the first 32 of them only, here all go.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_groups, cleaned = bool(_GROUPED_DIGITS.search(text)), text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if has_groups or is_beside_space else " ")
    return _FULL_STOP.sub("", cleaned).strip("'").strip().lower()


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L between both texts, normalised, in [0, 1]: of PyPI's `rouge` 1.0.1, which counts a word once.

    F = 2PR / (P + R + 1e-8), so that the same text scores a little below 1; a text without words scores 0.
    """
    prediction, reference = normalise(prediction), normalise(reference)
    if not (prediction and reference):
        return 0.0
    with _recursion(len(prediction.split()) + len(reference.split())):
        return float(_ROUGE.get_scores(prediction, reference)[0]["rouge-l"]["f"])


def multi_choice(prediction: str, choices: Sequence[str]) -> int:
    """The index of the choice that a text is nearest to, in TF-IDF of the normalised text and choices.

    The first of those that are equally near, so the very first where no word is common to both. Words of one character
    do not count (scikit-learn's tokenizer); where there are no others, the choice that is the text itself.

    Raises:
        UserError: there are no choices.
    """
    return _nearest(prediction, choices) or 0


def is_right(prediction: str, choices: Sequence[str], reference: str) -> bool:
    """Whether a text's choice is the reference; never, where no text has a word and none of the choices is the text.

    Raises:
        UserError: there are no choices.
    """
    index = _nearest(prediction, choices)
    return index is not None and normalise(choices[index]) == normalise(reference)


def is_right_image(prediction: str, reference: str) -> bool:
    """Whether a text begins as the reference, such as `Image B`, in seven characters, and names no second image."""
    prediction, reference = normalise(prediction), normalise(reference)
    return prediction[:7] == reference[:7] and sum(image in prediction for image in _IMAGES) <= 1


def category_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The unweighted mean over the tasks of each category, in percent; of those tasks and categories that are given.

    Args:
        scores: of tasks by their names in :data:`CATEGORIES`, each in [0, 1].

    Raises:
        UserError: there is no such task, or a score is not in [0, 1].
    """
    for name, score in scores.items():
        must_be_a_task(name)
        if not 0 <= score <= 1:
            raise UserError(f"score of {name} is {score}; must be within [0, 1]")
    given = {category: [scores[task] for task in tasks if task in scores] for category, tasks in CATEGORIES.items()}
    return {category: 100 * fmean(values) for category, values in given.items() if values}


def must_be_a_task(name: str) -> None:
    """Refuses a name that is none of the 31.

    Raises:
        UserError: it is none.
    """
    if name not in QUESTION_TYPES:
        near = difflib.get_close_matches(name, QUESTION_TYPES) or ["SlideVQA"]
        raise UserError(f"task is {name!r}; must be one of DEMON's, such as {', '.join(near)}")


def _nearest(prediction: str, choices: Sequence[str]) -> int | None:
    if not choices:
        raise UserError("choices is empty; must have at least one")
    texts = [normalise(text) for text in (prediction, *choices)]
    try:
        weights = TfidfVectorizer().fit_transform(texts)
    except ValueError:  # no text has a word
        return texts.index(texts[0], 1) - 1 if texts[0] in texts[1:] else None
    return int(cosine_similarity(weights[:1], weights[1:]).argmax())


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Room for so many more calls within each other: `rouge` recurs once a word."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
