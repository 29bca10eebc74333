"""From conversations to the padded batch of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from vittle.data.llava import Item
from vittle.data.template import ChatTemplate, Kind, Rendering
from vittle.errors import UserError
from vittle.methods.instruct import Loss, TaskTemplates

IGNORED = -100


class Collator:
    """Collates the items of a `LlavaDataset` for a processor's model; it can be pickled.

    Args:
        processor: a vision-language model's.
        max_length: tokens of a sample, image tokens included.
        loss: what has labels: "response", LLaVA's; or "instruct", L2T's, instructions too.
        task_templates: sentences of instructions that get no label under "instruct".

    Raises:
        UserError: the processor has no chat template, no fast tokenizer or no padding token.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        max_length: int = 2048,
        *,
        loss: Loss = "response",
        task_templates: TaskTemplates | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise UserError(f"{type(tokenizer).__name__} is a slow tokenizer; it must be a fast one")
        if tokenizer.pad_token is None:
            raise UserError(f"{type(tokenizer).__name__} has no padding token; set its `pad_token`")
        self.processor: Any = processor
        self.max_length = max_length
        self.labelled = [Kind.RESPONSE] + [Kind.INSTRUCTION] * (loss == "instruct")
        self.task_templates = task_templates or TaskTemplates({})
        self.template = ChatTemplate(processor)

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Collate B conversations, padded on the right to L tokens, at most `max_length`.

        A token that straddles a border goes with its first character that is not white space.

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 (B, L): labels are the ids in responses (and, by `loss`,
            in instructions) and -100 elsewhere. `instruction_mask`, bool (B, L), whatever the loss. What else the
            processor returns, such as `pixel_values`, float32 (images, 3, height, width) for LLaVA, which a batch
            without images lacks.

        Raises:
            UserError: a chat cannot be rendered, or `max_length` would cut image tokens or leave no label.
                The message names the record's id.
        """
        renderings = [self._render(item) for item in items]
        batch = self._process([r.text for r in renderings], [item["images"] for item in items])
        offsets = batch.pop("offset_mapping").tolist()
        replacements = batch.pop("text_replacement_offsets")
        kinds = [self._token_kinds(*row) for row in zip(renderings, replacements, offsets, strict=True)]
        for item, row in zip(items, kinds, strict=True):
            self._check_length(item, row)

        ids, kind = batch["input_ids"], torch.tensor(kinds)
        batch["labels"] = ids.where(torch.isin(kind, torch.tensor(self.labelled)), IGNORED)
        batch["instruction_mask"] = (kind == Kind.INSTRUCTION) | (kind == Kind.TASK_TEMPLATE)
        return {k: v[:, : self.max_length] if v.shape[:2] == ids.shape else v for k, v in batch.items()}

    def _render(self, item: Item) -> Rendering:
        try:
            rendering = self.template.render(item["messages"])
        except UserError as error:
            raise UserError(f"{_place(item)}: {error}") from error
        token = self.processor.image_token
        found, expected = rendering.text.count(token), len(item["images"])
        if found != expected:
            raise UserError(
                f"{_place(item)}: its rendered chat has {found} {token} placeholder(s) "
                f"and {expected} image(s); there must be one placeholder per image"
            )
        return rendering

    def _process(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        bos = self.processor.tokenizer.bos_token
        batch = self.processor(
            text=texts,
            images=images if any(images) else None,
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        if "text_replacement_offsets" not in batch:
            raise UserError(f"{type(self.processor).__name__} does not tell where it puts image tokens")
        return dict(batch)

    def _token_kinds(
        self, rendering: Rendering, replacements: Sequence[Mapping[str, Any]], offsets: Sequence[tuple[int, int]]
    ) -> list[int]:
        """The kind of each token; the offsets are in the text with the images' placeholders replaced."""
        text = rendering.text
        kinds = bytearray(len(text))
        for start, end, kind in rendering.spans:
            kinds[start:end] = bytes([kind]) * (end - start)
            if kind == Kind.INSTRUCTION:
                for i, j in self.task_templates.spans(text[start:end]):
                    kinds[start + i : start + j] = bytes([Kind.TASK_TEMPLATE]) * (j - i)
        for replacement in reversed(replacements):
            (start, end), expanded = replacement["span"], replacement["replacement"]
            text = text[:start] + expanded + text[end:]
            kinds[start:end] = bytes([Kind.IMAGE]) * len(expanded)
        return [kinds[_owner(text, start, end)] if end else Kind.TEMPLATE for start, end in offsets]

    def _check_length(self, item: Item, kinds: list[int]) -> None:
        last_image = max((i for i, kind in enumerate(kinds) if kind == Kind.IMAGE), default=-1)
        needed = 1 + max(last_image, kinds.index(Kind.RESPONSE))
        if needed > self.max_length:
            raise UserError(
                f"{_place(item)}: max_length {self.max_length} cuts image tokens or the whole answer; "
                f"raise max_length to {needed} or more"
            )


def _place(item: Item) -> str:
    return item.get("place", f"record {item['id']!r}")


def _owner(text: str, start: int, end: int) -> int:
    """The character that decides a token's kind.

    A byte-level tokenizer may trim white space off its offsets: a token of nothing else is empty, after it.
    """
    if start == end:
        return start - 1
    return next((i for i in range(start, end) if not text[i].isspace()), start)


class CaptionCollator(Collator):
    """For aligning the projector: images and captions alone, without roles or instructions, as LLaVA's stage 1.

    The end of a caption is the tokenizer's eos token.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int = 2048) -> None:
        super().__init__(processor, max_length)
        plain: Any = _Plain(processor)
        self.template = ChatTemplate(plain)

    def _render(self, item: Item) -> Rendering:
        messages = [
            {**message, "content": [part for part in message["content"] if i % 2 or part["type"] != "text"]}
            for i, message in enumerate(item["messages"])
        ]
        return super()._render({**item, "messages": messages})


class _Plain:
    """A processor's tokenizer with a chat template of its own: every image, then every text."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer, self.image_token = processor.tokenizer, processor.image_token
        self.chat_template = "plain"

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], tokenize: bool) -> str:
        parts = [part for message in messages for part in message["content"]]
        return "".join(self.image_token if part["type"] == "image" else f"{part['text']} " for part in parts)
