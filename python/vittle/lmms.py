"""`--model vittle` of lmms-eval: a tuned model, asked what its benchmarks ask, or a shifted version of that.

Imported by lmms-eval alone, through the entry point that names :data:`MANIFEST`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

from vittle.data.llava import MARKER
from vittle.errors import UserError
from vittle.shifts import Condition, parse_conditions
from vittle.shifts.condition import TRANSLATION

MANIFEST = ModelManifest("vittle", simple_class_path="vittle.lmms.Vittle")

MAX_NEW_TOKENS = 1024
"""Where a benchmark names no number; of lmms-eval's own LLaVA too."""


class Vittle(lmms):  # type: ignore[misc]
    """A vision-language model with PEFT's adapters and its bottleneck, if any, under one condition.

    Each process of ``accelerate launch`` holds the whole model and answers its share of the questions.

    Args:
        pretrained: folder of a run of ``vittle train``, or another folder or Hub id of a model.
        shifts: one condition: `frost:3`, `keyboard:2`, `frost:3+keyboard:2`, `clean`.
        seed: of the shifts; a sample's noise depends on it, the task, the split and the sample's number alone.
        batch_size: questions at a time, in each process.
        device: of a single process; None: a GPU if there is one.

    Raises:
        UserError: an argument cannot be used.
    """

    def __init__(
        self,
        pretrained: str,
        shifts: str = "clean",
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        # Not above: lmms-eval loads this file whichever model it runs.
        from accelerate import Accelerator

        from vittle.models import load_processor, load_tuned

        super().__init__()
        self.condition, self.seed = _condition(str(shifts)), seed
        self.batch_size = _positive(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_tuned(pretrained, dtype).to(self.device)
        self.processor = load_processor(pretrained)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of lmms-eval's instances, as each one's settings ask for them."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc=self.condition.name, unit="answer", disable=self.rank != 0) as bar:
            for numbers in _batches([request.args for request in requests], self.batch_size):
                asked = sorted((self._asked(number, *requests[number].args) for number in numbers), key=_has_images)
                for _, run in groupby(asked, _has_images):
                    answers |= self._answers([*run])
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not done: lmms-eval's scorer takes a choice's smallest value for the best, its interface the largest."""
        raise NotImplementedError("the vittle model answers in words; tasks that rank choices by likelihood cannot run")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not done."""
        raise NotImplementedError("the vittle model answers one question at a time; tasks of many rounds cannot run")

    def _asked(
        self, number: int, context: str, settings: Mapping[str, Any], visuals: Callable[[Any], Any], doc: int,
        task: str, split: str,
    ) -> _Asked:  # fmt: skip
        """A request of a benchmark as the model is asked it."""
        from vittle.evaluate import prompt_of

        id = f"{task}\0{split}\0{doc}"
        shown = visuals(self.task_dict[task][split][doc]) or []
        for each in shown:
            if not isinstance(each, Image.Image):
                found = type(each).__name__
                raise UserError(f"task {task} shows a {found}; must show images, neither video nor audio")
        images = self.condition.images([image.convert("RGB") for image in shown], id, self.seed)
        if context.count(MARKER) != len(images):
            context = f"{MARKER * len(images)}\n{context.replace(MARKER, '')}"
        question = self.condition.question(context, id, self.seed)
        return _Asked(number, prompt_of(self.processor, question), images, settings)

    def _answers(self, batch: Sequence[_Asked]) -> dict[int, str]:
        """By number; the settings are the same for all, and so is whether there are images."""
        from vittle.evaluate import generate, tensors_of

        settings = batch[0].settings
        tensors = tensors_of(self.processor, [each.prompt for each in batch], [each.images for each in batch])
        texts = generate(self.model, self.processor, tensors, _generation(settings))
        return {each.number: _until(text, settings).strip() for each, text in zip(batch, texts, strict=True)}


@dataclass(frozen=True)
class _Asked:
    """A request, by its number among all, as the model takes it."""

    number: int
    prompt: str
    images: list[Image.Image]
    settings: Mapping[str, Any]


def _has_images(asked: _Asked) -> bool:
    return bool(asked.images)


def _batches(arguments: Sequence[tuple[Any, ...]], size: int) -> Iterator[list[int]]:
    """The numbers of requests with the same settings, those with like lengths of text together."""
    keys = [(repr(settings), len(context)) for context, settings, *_ in arguments]
    in_order = sorted(range(len(keys)), key=lambda number: keys[number])
    for _, run in groupby(in_order, lambda number: keys[number][0]):
        numbers = list(run)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is told: greedy unless the benchmark samples.

    Settings of LLaVA's own code, such as `image_aspect_ratio`, are none of it.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    samples = bool(given.get("do_sample", given.get("temperature"))) and given.get("temperature") != 0
    names = ("max_new_tokens", "num_beams", "repetition_penalty") + ("temperature", "top_p", "top_k") * samples
    settings = {name: given[name] for name in names if name in given}
    return {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": samples} | settings


def _until(text: str, asked: Mapping[str, Any]) -> str:
    """The text before the first of the strings that the benchmark stops at.

    lmms-eval gives a benchmark that names none the blank line of its few-shot prompts; answers may have blank lines.
    """
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else until
    for stop in [] if stops == ["\n\n"] else filter(None, stops):
        text = text.partition(stop)[0]
    return text


def _condition(shifts: str) -> Condition:
    if TRANSLATION in shifts:
        raise UserError(f"shifts is {shifts!r}; must be no translation: none are at hand for the texts of lmms-eval")
    found = parse_conditions([shifts])
    if len(found) > 2:
        raise UserError(f"shifts is {shifts!r}; must be one condition, such as frost:3 or frost:3+keyboard:2")
    return found[-1]


def _positive(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise UserError(f"batch_size is {batch_size!r}; must be a whole number from 1 on")
    return int(batch_size)
