"""EMI, EMID and its bound over an evaluation: of every condition against the clean one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vittle.data.llava import MARKER, decode
from vittle.errors import UserError
from vittle.evaluate import progress_bar
from vittle.evaluation import Evaluation, open_evaluation
from vittle.methods.saving import write_json
from vittle.metrics.embeddings import embed_images, embed_texts, read_embeddings, write_embeddings
from vittle.metrics.emi import CLUB, Embeddings, emid_report, load_club, save_club
from vittle.shifts import CLEAN, Condition

RESULT = "emid.json"
EMBEDDINGS = "embeddings"
"""A folder in the evaluation's, with a file for each condition."""

HIDDEN_SIZE = 500
"""Of a CLUB that is trained here, as of the released one."""


def measure(
    folder: str | Path, image_encoder: str, text_encoder: str, *, club: str | None = None,
    entropy_scale: float | None = None, seed: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """EMID and its bound for each condition of an evaluation but the clean one; written to ``emid.json`` there.

    Args:
        folder: of an evaluation, of a task whose questions all have images.
        image_encoder: folder or Hub id; the paper's is CLIP ViT-B/32.
        text_encoder: folder or Hub id; the paper's is xlm-roberta-base. Both must be of one width.
        club: a file of weights, trained on other samples; None: one is trained on this evaluation's own pairs of
            question and answer, the model's and the reference, of all conditions: good for comparing conditions, while
            the estimates themselves are too high where samples are few.
        entropy_scale: of the full bound, as :func:`vittle.metrics.emi.emid_upper_bound` takes it.
        seed: of the CLUB that is trained here.

    Raises:
        UserError: the folder holds no evaluation with clean answers, or an encoder or the file cannot be used.
    """
    embedded, path = _embedded(folder, image_encoder, text_encoder), Path(folder) / RESULT
    trained = load_club(club) if club is not None else _fit(list(embedded.values()), seed)
    found = {
        condition.name: emid_report(trained, embedded[CLEAN], shifted, entropy_scale=entropy_scale)
        for condition, shifted in embedded.items()
        if condition != CLEAN
    }
    write_json(path, found)
    return found


def train_club(folder: str | Path, image_encoder: str, text_encoder: str, path: str | Path, *, seed: int = 0) -> None:
    """Trains a CLUB on an evaluation's pairs, and writes it, so that it can measure others.

    Raises:
        UserError: as :func:`measure`.
    """
    save_club(_fit(list(_embedded(folder, image_encoder, text_encoder).values()), seed), path)


def _embedded(folder: str | Path, image_encoder: str, text_encoder: str) -> dict[Condition, Embeddings]:
    """Of every condition whose answers are all there."""
    evaluation = open_evaluation(folder)
    conditions = [each for each in evaluation.conditions if evaluation.is_answered(each)]
    if CLEAN not in conditions or len(conditions) < 2:
        raise UserError(f"{folder} must hold all answers to the clean questions and to shifted ones")
    ids = _answered_everywhere(evaluation, conditions)
    return {each: _embeddings(evaluation, each, ids, image_encoder, text_encoder) for each in conditions}


def _answered_everywhere(evaluation: Evaluation, conditions: list[Condition]) -> list[str]:
    """The samples that have an answer under all conditions."""
    answered = [
        {each.id for each in evaluation.answers(condition) if each.text is not None} for condition in conditions
    ]
    ids = [sample.id for sample in evaluation.samples if all(sample.id in each for each in answered)]
    if bare := [id for id in ids if not evaluation.task.by_id[id].images]:
        raise UserError(f"sample {bare[0]} has no image; EMI is of questions about images")
    if len(ids) < 2:
        raise UserError(f"{len(ids)} samples have answers under all conditions; must be at least 2")
    return ids


def _embeddings(
    evaluation: Evaluation, condition: Condition, ids: list[str], image_encoder: str, text_encoder: str
) -> Embeddings:
    """Of one condition, from their file if they are there."""
    path = evaluation.folder / EMBEDDINGS / f"{condition.file_name}.safetensors"
    if path.exists():
        return Embeddings(**read_embeddings(path))
    answers = {each.id: each for each in evaluation.answers(condition)}
    samples = [evaluation.task.by_id[id] for id in ids]
    seed = evaluation.settings["seed"]

    def images() -> Any:
        for sample in samples:
            yield condition.images([decode(sample.images[0])], sample.id, seed)[0]

    def texts(of: Callable[[str], str]) -> Tensor:
        return embed_texts([of(id).replace(MARKER, "").strip() for id in ids], text_encoder)

    with progress_bar(4, f"embedding {condition.name}"[:24]) as bar:
        found = {"visual": embed_images(images(), image_encoder)}
        for name, of in {
            "text": lambda id: answers[id].question,
            "response": lambda id: answers[id].text or "",
            "reference": lambda id: evaluation.task.by_id[id].reference,
        }.items():
            bar.update()
            found[name] = texts(of)
    path.parent.mkdir(exist_ok=True)
    write_embeddings(found, path)
    return Embeddings(**found)


def _fit(embedded: list[Embeddings], seed: int) -> CLUB:
    x = torch.cat([each.query for each in embedded for _ in range(2)])
    y = torch.cat([answers for each in embedded for answers in (each.response, each.reference)])
    return CLUB(x.shape[1], y.shape[1], HIDDEN_SIZE).fit(x, y, seed=seed)


def table(found: dict[str, dict[str, float]]) -> str:
    """For a terminal, with the means below."""
    names = ("emid", "emid_upper_bound", "jsd_visual", "jsd_text", "jsd_response_shifted")
    heads = ("EMID", "bound", "JSD image", "JSD text", "JSD answer")
    means = {name: sum(each[name] for each in found.values()) / len(found) for name in names}
    lines = [f"{'':24}" + "".join(f"{head:>11}" for head in heads)]
    for condition, values in {**found, "mean": means}.items():
        lines.append(f"{condition[:24]:24}" + "".join(f"{values[name]:11.4f}" for name in names))
    return "\n".join(lines)
