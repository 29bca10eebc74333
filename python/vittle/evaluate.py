"""Greedy answers of a vision-language model to the questions of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from vittle.data.llava import Item


def answer(
    model: Any,
    processor: Any,
    items: Iterable[Item],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    change: Callable[[Image.Image, int], Image.Image] | None = None,
    progress: tqdm[Any] | None = None,
) -> list[str]:
    """The model's answer to each item's last question, greedily, in batches padded on the left.

    Args:
        model: a vision-language model in eval mode, with or without a bottleneck.
        processor: its processor, with a chat template.
        items: of a `LlavaDataset`; the last turn, the reference answer, is not shown to the model.
        batch_size: items at a time.
        max_new_tokens: where an answer that does not end is cut.
        change: what to do to each image, given the item's position, before the model sees it.
        progress: a bar to move by one for each item.
    """
    answers: list[str] = []
    stream = iter(items)
    while batch := list(islice(stream, batch_size)):
        texts = [processor.apply_chat_template(item["messages"][:-1], add_generation_prompt=True) for item in batch]
        images = [
            [image if change is None else change(image, len(answers) + offset) for image in item["images"]]
            for offset, item in enumerate(batch)
        ]
        inputs = processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if progress is not None:
            progress.update(len(batch))
    return [text.strip() for text in answers]


def batched_progress(total: int, description: str) -> tqdm[Any]:
    """A progress bar over items that fits 80 columns."""
    return tqdm(total=total, desc=description, unit="answer", ncols=80, leave=False)


def exact_matches(answers: Iterable[str], references: Iterable[str]) -> Iterator[bool]:
    """Whether each answer is its reference, apart from case and a final full stop."""
    for found, wanted in zip(answers, references, strict=True):
        yield _normal(found) == _normal(wanted)


def _normal(text: str) -> str:
    return text.strip().rstrip(".").lower()
