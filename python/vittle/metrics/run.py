"""EMI, EMID and its bound over an evaluation: of every condition against the clean one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vittle.data.llava import MARKER, decode
from vittle.errors import UserError
from vittle.evaluate import progress_bar
from vittle.evaluation import Evaluation, open_evaluation
from vittle.files import write_json
from vittle.metrics.embeddings import (
    Embedder,
    embed,
    image_embedder,
    read_embeddings,
    read_origin,
    text_embedder,
    write_embeddings,
)
from vittle.metrics.emi import CLUB, Embeddings, emid_report, load_club, save_club
from vittle.models import fingerprint
from vittle.shifts import CLEAN, Condition
from vittle.tasks import Sample

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
    embedded = _Embedded(folder, image_encoder, text_encoder)
    embedded.write()
    trained = load_club(club) if club is not None else _fit(list(embedded), seed)
    clean = embedded[CLEAN]
    found = {
        condition.name: emid_report(trained, clean, embedded[condition], entropy_scale=entropy_scale)
        for condition in embedded.conditions
        if condition != CLEAN
    }
    write_json(Path(folder) / RESULT, found)
    return found


def train_club(
    folders: str | Path | Sequence[str | Path], image_encoder: str, text_encoder: str, path: str | Path, *,
    seed: int = 0,
) -> None:  # fmt: skip
    """Trains a CLUB on the pairs of one or more evaluations, and writes it, so that it can measure others.

    Raises:
        UserError: as :func:`measure`.
    """
    listed = [folders] if isinstance(folders, str | Path) else folders
    evaluations = [_Embedded(folder, image_encoder, text_encoder) for folder in listed]
    for each in evaluations:
        each.write()
    save_club(_fit([embeddings for each in evaluations for embeddings in each], seed), path)


class _Embedded:
    """An evaluation's embeddings, a file for each condition whose answers are all there.

    A file tells what it was made of; where that is other than what is here now, it is made again.
    """

    def __init__(self, folder: str | Path, image_encoder: str, text_encoder: str) -> None:
        self.evaluation = open_evaluation(folder)
        self.conditions = [each for each in self.evaluation.conditions if self.evaluation.is_answered(each)]
        if CLEAN not in self.conditions or len(self.conditions) < 2:
            raise UserError(f"{folder} must hold all answers to the clean questions and to shifted ones")
        self.samples = _answered_everywhere(self.evaluation, self.conditions)
        self.encoders = {
            "image_encoder": _identity(image_encoder, "an image encoder"),
            "text_encoder": _identity(text_encoder, "a text encoder"),
        }
        self._images = _Embedder(partial(image_embedder, image_encoder))
        self._texts = _Embedder(partial(text_embedder, text_encoder))

    def __getitem__(self, condition: Condition) -> Embeddings:
        return Embeddings(**read_embeddings(self._path(condition)))

    def __iter__(self) -> Iterator[Embeddings]:
        return map(self.__getitem__, self.conditions)

    def write(self) -> None:
        """Writes the files that are missing, the clean one first: what does not change is taken from there."""
        texts = {each: self._texts_of(each) for each in self.conditions}
        origins = {each: self._origin(each, texts[each]) for each in self.conditions}
        todo = [each for each in self.conditions if read_origin(self._path(each)) != origins[each]]
        if not todo:
            return
        with progress_bar(len(todo) * len(self.samples), "embedding") as bar:
            for condition in [CLEAN, *(each for each in todo if each != CLEAN)]:
                path = self._path(condition)
                path.parent.mkdir(exist_ok=True)
                if condition in todo:
                    bar.set_description(f"embedding {condition.name}"[:24])
                    found = {"visual": self._images(self._images_of(condition, bar.update))}
                    found |= {
                        name: self._texts((text, partial(_given, text)) for text in own)
                        for name, own in texts[condition].items()
                    }
                    write_embeddings(found, path, origins[condition])
                if condition == CLEAN:
                    clean = read_embeddings(path)
                    self._images.keep([str(sample.images[0]) for sample in self.samples], clean["visual"])
                    for name, own in texts[CLEAN].items():
                        self._texts.keep(own, clean[name])

    def _path(self, condition: Condition) -> Path:
        return self.evaluation.folder / EMBEDDINGS / f"{condition.file_name}.safetensors"

    def _texts_of(self, condition: Condition) -> dict[str, list[str]]:
        answers = {each.id: each for each in self.evaluation.answers(condition)}
        own = [answers[sample.id] for sample in self.samples]
        return {
            "text": [_plain(each.question) for each in own],
            "response": [_plain(each.text or "") for each in own],
            "reference": [_plain(sample.reference) for sample in self.samples],
        }

    def _images_of(self, condition: Condition, moved: Callable[[int], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The first image of each sample after what tells it from others: its file, or its shift and the sample."""
        for sample in self.samples:
            moved(1)
            key = f"{condition.image} of {sample.id}" if condition.image else str(sample.images[0])
            yield key, partial(self._image, condition, sample)

    def _image(self, condition: Condition, sample: Sample) -> Image.Image:
        return condition.images([decode(sample.images[0])], sample.id, self.evaluation.settings["seed"])[0]

    def _origin(self, condition: Condition, texts: Mapping[str, list[str]]) -> dict[str, str]:
        samples = [(sample.id, sample.images[0].name) for sample in self.samples]
        told = json.dumps([condition.name, self.evaluation.settings["seed"], samples, texts])
        return {**self.encoders, "samples": hashlib.sha256(told.encode()).hexdigest()}


class _Embedder:
    """Embeds each content once in a call, and what it keeps not again; its encoder is loaded when it is first used."""

    def __init__(self, load: Callable[[], Embedder]) -> None:
        self._load = load
        self._kept: dict[str, Tensor] = {}

    def __call__(self, items: Iterable[tuple[str, Callable[[], Any]]]) -> Tensor:
        """Of items that come after what tells them apart."""
        keys, new = list[str](), dict[str, int]()

        def unknown() -> Iterator[Any]:
            for key, item in items:
                keys.append(key)
                if key not in self._kept and key not in new:
                    new[key] = len(new)
                    yield item()

        stream = unknown()
        first = list(islice(stream, 1))
        rows = embed(chain(first, stream), self._encoder) if first else torch.empty(0)
        return torch.stack([rows[new[key]] if key in new else self._kept[key] for key in keys])

    def keep(self, keys: Iterable[str], rows: Tensor) -> None:
        self._kept.update(zip(keys, rows, strict=True))

    @cached_property
    def _encoder(self) -> Embedder:
        return self._load()


def _answered_everywhere(evaluation: Evaluation, conditions: list[Condition]) -> list[Sample]:
    """The samples that have an answer under all conditions."""
    ids = set.intersection(
        *({each.id for each in evaluation.answers(condition) if each.text is not None} for condition in conditions)
    )
    samples = [sample for sample in evaluation.samples if sample.id in ids]
    if bare := [sample.id for sample in samples if not sample.images]:
        raise UserError(f"sample {bare[0]} has no image; EMI is of questions about images")
    if len(samples) < 2:
        raise UserError(f"{len(samples)} samples have answers under all conditions; must be at least 2")
    return samples


def _identity(encoder: str, name: str) -> str:
    try:
        return fingerprint(encoder)
    except UserError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"encoder is {encoder!r}; must be a folder or Hub id of {name}: {reason}") from error


def _given(item: Any) -> Any:
    return item


def _plain(text: str) -> str:
    return text.replace(MARKER, "").strip()


def _fit(embedded: Sequence[Embeddings], seed: int) -> CLUB:
    """On all pairs of a query with the model's and with the reference answer; the files are read as they are drawn."""
    counts = torch.tensor([2 * len(each.text) for each in embedded])
    ends = counts.cumsum(0)

    def draw(rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = list[Tensor](), list[Tensor]()
        places = torch.searchsorted(ends, rows, right=True)
        for place in places.unique().tolist():
            each, own = embedded[place], rows[places == place] - (ends - counts)[place]
            row, is_reference = own % len(each.text), own >= len(each.text)
            x.append((each.visual[row] + each.text[row]) / 2)
            y.append(torch.where(is_reference[:, None], each.reference[row], each.response[row]))
        return torch.cat(x), torch.cat(y)

    club = CLUB(embedded[0].text.shape[1], embedded[0].response.shape[1], HIDDEN_SIZE)
    return club.fit_drawn(draw, int(ends[-1]), seed=seed, progress=True)


def table(found: dict[str, dict[str, float]]) -> str:
    """For a terminal, with the means below."""
    names = ("emid", "emid_upper_bound", "jsd_visual", "jsd_text", "jsd_response_shifted")
    heads = ("EMID", "bound", "JSD image", "JSD text", "JSD answer")
    means = {name: sum(each[name] for each in found.values()) / len(found) for name in names}
    lines = [f"{'':24}" + "".join(f"{head:>11}" for head in heads)]
    for condition, values in {**found, "mean": means}.items():
        lines.append(f"{condition[:24]:24}" + "".join(f"{values[name]:11.4f}" for name in names))
    return "\n".join(lines)
