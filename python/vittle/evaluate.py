"""Greedy answers of a vision-language model to a task's questions, under one condition after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vittle.data.llava import decode, parts
from vittle.errors import UserError
from vittle.shifts import CLEAN, Condition
from vittle.shifts.condition import Translator
from vittle.tasks import Sample


@dataclass(frozen=True)
class Answer:
    """What a model answered; or why it was not asked."""

    id: str
    question: str
    """As it was asked, shifted."""
    text: str | None
    error: str = ""
    """Of a broken image."""


@dataclass(frozen=True)
class Asking:
    """How questions are asked: what the answers depend on besides model, samples and condition."""

    max_new_tokens: int = 128
    seed: int = 0
    workers: int = 0
    """Processes that decode and shift images; the answers do not depend on them."""
    translator: Translator | None = None


def batches(samples: Iterable[Sample], size: int) -> list[list[Sample]]:
    """Samples of like length together, those with images apart from those without; always the same ones."""
    in_order = sorted(samples, key=lambda sample: (bool(sample.images), len(sample.question)))
    runs = [list(run) for _, run in groupby(in_order, key=lambda sample: bool(sample.images))]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def ask(
    model: Any, processor: Any, batches: Sequence[Sequence[Sample]], condition: Condition = CLEAN,
    asking: Asking | None = None,
) -> Iterator[list[Answer]]:  # fmt: skip
    """The model's greedy answers, a batch at a time, padded on the left.

    A sample with an image that cannot be decoded is not asked; its answer says why.

    Args:
        model: a vision-language model in eval mode, with or without bottleneck and adapters.
        processor: its processor, with a chat template.
        batches: as :func:`batches` makes them.
        condition: the shift of images and texts.
        asking: the settings; the defaults if None.
    """
    asking = asking or Asking()
    for answers, tensors in inputs(processor, batches, condition, asking):
        texts: Iterator[str] = iter(())
        if tensors is not None:
            settings = {"max_new_tokens": asking.max_new_tokens, "do_sample": False}
            texts = iter(generate(model, processor, tensors, settings))
        yield [each if each.error else Answer(each.id, each.question, next(texts).strip()) for each in answers]


def inputs(
    processor: Any, batches: Sequence[Sequence[Sample]], condition: Condition, asking: Asking
) -> Iterator[tuple[list[Answer], dict[str, Tensor] | None]]:
    """Each batch as the model takes it (None, if no image of it can be decoded), after the answers without texts."""
    yield from DataLoader(_Inputs(processor, batches, condition, asking), batch_size=None, num_workers=asking.workers)


def prompt_of(processor: Any, question: str) -> str:
    """A question, with its image markers, as the chat template writes it."""
    messages = [{"role": "user", "content": parts(question)}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def tensors_of(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
    """A batch of prompts and their images, all with images or all without, padded on the left."""
    return dict(
        processor(
            text=list(prompts), images=images if any(images) else None, padding=True, padding_side="left",
            return_tensors="pt",
        )
    )  # fmt: skip


def generate(model: Any, processor: Any, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[str]:
    """What the model writes after each prompt of a batch; the settings are those of its `generate`."""
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    with torch.inference_mode():
        ids = model.generate(**tensors, **settings)
    repeated = 0 if model.config.get_text_config().is_encoder_decoder else tensors["input_ids"].shape[1]
    return list(processor.batch_decode(ids[:, repeated:], skip_special_tokens=True))


def progress_bar(total: int, description: str) -> tqdm[Any]:
    """Over answers; it fits 80 columns."""
    return tqdm(total=total, desc=description, unit="answer", ncols=80, leave=False)


class _Inputs(Dataset[tuple[list[Answer], Any]]):
    """Of :func:`inputs`, an item a batch."""

    def __init__(
        self, processor: Any, batches: Sequence[Sequence[Sample]], condition: Condition, asking: Asking
    ) -> None:
        self.processor, self.batches, self.condition, self.asking = processor, batches, condition, asking

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[Answer], Any]:
        answers, texts, images = [], [], []
        for sample in self.batches[index]:
            question = self.condition.question(sample.question, sample.id, self.asking.seed, self.asking.translator)
            try:
                shown = self._images(sample)
            except UserError as error:
                answers.append(Answer(sample.id, question, None, str(error)))
                continue
            answers.append(Answer(sample.id, question, None))
            texts.append(prompt_of(self.processor, question))
            images.append(shown)
        return answers, tensors_of(self.processor, texts, images) if texts else None

    def _images(self, sample: Sample) -> list[Image.Image]:
        return self.condition.images(map(decode, sample.images), sample.id, self.asking.seed)
