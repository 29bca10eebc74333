"""POPE (Li et al., 2023): whether a model sees objects that are not there; accuracy, precision, recall and F1."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from vittle.errors import UserError, shown

Answer = Literal["yes", "no"]


def _released(text: str) -> Answer:
    """Of LLaVA's and Vittle's scripts: no, if the first sentence has a word No, no or not; all else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _strict(text: str) -> Answer | None:
    """Only the word itself, however it is written; anything else is no answer, and wrong."""
    match = re.fullmatch(r"\W*(yes|no)\W*", text, re.IGNORECASE)
    return None if match is None else "yes" if match[1].lower() == "yes" else "no"


RULES: Mapping[str, Callable[[str], Answer | None]] = {"released": _released, "strict": _strict}


def parse_answer(text: str, rule: str = "released") -> Answer | None:
    """What a model's text answers: "yes", "no", or, by the rule "strict" alone, None for neither.

    The rule "released", of LLaVA's script eval_pope.py, takes whatever says no "no" for a yes, an empty text too.

    Raises:
        UserError: there is no such rule.
    """
    if rule not in RULES:
        raise UserError(f"rule is {rule!r}; must be one of {', '.join(RULES)}")
    return RULES[rule](text)


def count(prediction: Answer | None, label: str) -> dict[str, float]:
    """The cell of the confusion table that one prediction falls into; `other` are those that say neither."""
    if prediction is None:
        return {"asked": 1, "positive": label == "yes", "other": 1}
    cell = ("t" if prediction == label else "f") + ("p" if prediction == "yes" else "n")
    return {"asked": 1, "positive": label == "yes", cell: 1}


def rates(totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall, F1 and the share of yes among the predictions, of summed counts; 0 of nothing."""
    tp, fp = totals["tp"], totals["fp"]
    said_yes, positive = tp + fp, totals["positive"]
    return {
        "accuracy": _ratio(tp + totals["tn"], totals["asked"]),
        "precision": _ratio(tp, said_yes),
        "recall": _ratio(tp, positive),
        "f1": _ratio(2 * tp, said_yes + positive),
        "yes_ratio": _ratio(said_yes, totals["asked"]),
    }


def score(predictions: Iterable[Answer | None], labels: Iterable[str]) -> dict[str, float]:
    """Accuracy, precision, recall, f1 and yes_ratio, each in [0, 1]; yes_ratio is the predictions', not the labels'.

    Args:
        predictions: "yes", "no" or None, as :func:`parse_answer` gives them; None is wrong whatever the label.
        labels: "yes" or "no".

    Raises:
        UserError: the two differ in number, are empty, or one is something else.
    """
    predictions, labels = list(predictions), list(labels)
    if len(predictions) != len(labels) or not labels:
        raise UserError(f"there are {len(predictions)} predictions and {len(labels)} labels; must be equally many")
    totals = dict.fromkeys(("asked", "positive", "tp", "fp", "tn", "fn", "other"), 0.0)
    for index, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        if prediction not in ("yes", "no", None):
            raise UserError(f"predictions[{index}] is {shown(prediction)}; must be 'yes', 'no' or None")
        if label not in ("yes", "no"):
            raise UserError(f"labels[{index}] is {shown(label)}; must be 'yes' or 'no'")
        for name, value in count(prediction, label).items():
            totals[name] += value
    return {name: float(rate) for name, rate in rates({n: np.asarray(v) for n, v in totals.items()}).items()}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, np.where(whole > 0, whole, 1))
