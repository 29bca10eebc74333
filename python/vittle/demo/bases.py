"""Base models for the second look: a language model that knows the tasks, and eyes that pass on what captions tell.

They mirror what VPG-C (arXiv 2308.04152) starts from, in three stages on training scenes:

1. A Llama learns the tasks from text alone. Where an image would stand, stand the words of its patches.
2. A vision tower learns to see what each patch's cell holds, by a linear read-out that is thrown away.
3. Both are frozen. What lies between them, a Q-Former and its projection (BLIP-2) or a projector (LLaVA), is aligned
   with the words of all cells; and then learns from captions that tell the upper row of each scene and no more, so that
   the lower row does not reach the Llama.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from vittle.demo import edits
from vittle.demo.checkpoint import (
    CONTENTS,
    IMAGE_TOKENS,
    NOTHING,
    PATCH,
    TOWER,
    WIDTH,
    PatchReader,
    SceneBatches,
    language_config,
    make_model,
    make_processor,
    save,
    train,
)
from vittle.demo.scenes import CANVAS, CAPTION_PROMPT, CELLS, Placed, Question, Scene, draw, questions
from vittle.discriminative.pairs import PROMPT
from vittle.files import write_json

Form = Literal["qformer", "linear"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Of the second look: a BLIP-2 has the one, a LLaVA the other."""

LANGUAGE_STEPS = 4800
EYES_STEPS = (800, 600, 300)
"""Of seeing, of aligning and of captions."""
TEXT_BATCH = 32
WRONG_WORDS = 0.1
"""Of the patches' words that the Llama reads, drawn at random: it is to bear eyes that err."""

HELD_OUT = 500
"""Scenes that a base is measured on."""
BASE = "base.json"
BETWEEN = {"query_tokens", "qformer", "language_projection", "multi_modal_projector"}
"""The modules between tower and Llama."""

_SIDE = CANVAS // PATCH
_CELL_OF_PATCH = [2 * (row * 2 // _SIDE) + column * 2 // _SIDE for row in range(_SIDE) for column in range(_SIDE)]


def upper_row(scene: Scene) -> Scene:
    """What captions tell of."""
    return Scene(tuple(p for p in scene.placed if p.cell < 2))


def caption(scene: Scene) -> str:
    """The digits and their places, in reading order: `The 3 is top left. ...`; of none `The scene shows nothing.`"""
    return " ".join(f"The {p.digit} is {CELLS[p.cell]}." for p in scene.placed) or "The scene shows nothing."


def words_of(scene: Scene, rng: np.random.Generator, wrong: float = WRONG_WORDS) -> list[str]:
    """What stands for the scene's image: for each patch what its cell holds, but for a share of random words."""
    words = [scene.contents[cell] for cell in _CELL_OF_PATCH]
    return [str(rng.choice(CONTENTS)) if rng.random() < wrong else word for word in words]


def sample_told(rng: np.random.Generator, images: int) -> tuple[list[Scene], Question]:
    """One scene or two that are never drawn, and a question about them, all kinds equally often."""
    first = _sample_words(rng)
    if images == 1:
        scenes, asked = [first], [Question("caption", CAPTION_PROMPT, caption(first)), *questions(first)]
    else:
        scenes = [first, _sample_words(rng)]
        asked = edits.comparisons(*scenes)
        if rng.random() < 1 / 3:
            scenes = [first, other := _changed(first, rng)]
            asked = [Question("spot_the_difference", PROMPT, edits.difference(first, other))]
    kind = rng.choice(sorted({question.kind for question in asked}))
    return scenes, draw([question for question in asked if question.kind == kind], rng)


def _sample_words(rng: np.random.Generator) -> Scene:
    """No to four digits."""
    cells = sorted(rng.permutation(4)[: rng.integers(5)].tolist())
    return _told({cell: int(rng.integers(10)) for cell in cells})


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    """One or two cells hold something else."""
    contents = list(scene.contents)
    for cell in rng.permutation(4)[: rng.integers(1, 3)]:
        contents[cell] = rng.choice([word for word in CONTENTS if word != contents[cell]])
    return _told({cell: int(word) for cell, word in enumerate(contents) if word.isdigit()})


def _told(digits: dict[int, int]) -> Scene:
    return Scene(tuple(Placed(-1, digits[cell], cell, 0, 0, 0) for cell in sorted(digits)))


class Texts:
    """Endless batches of questions about scenes in words, of one image and of two in turn."""

    def __init__(
        self, processor: LlavaProcessor, seed: int, size: int = TEXT_BATCH, wrong: float = WRONG_WORDS
    ) -> None:
        self.tokenizer, self.size, self.wrong = processor.tokenizer, size, wrong
        self.rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            for images in (1, 2):
                yield self.batch([sample_told(self.rng, images) for _ in range(self.size)])

    def batch(self, told: Sequence[tuple[Sequence[Scene], Question]]) -> dict[str, Tensor]:
        """Model inputs with labels on the answers alone, padded on the right."""
        words = (
            " ".join(word for scene in scenes for word in words_of(scene, self.rng, self.wrong)) for scenes, _ in told
        )
        return answering(
            self.tokenizer, [f"{shown} {asked.text}" for shown, (_, asked) in zip(words, told, strict=True)],
            [asked.answer for _, asked in told],
        )  # fmt: skip


class UpperRows(SceneBatches):
    """Endless batches of scenes whose captions tell the upper row alone."""

    def captions(self) -> Iterator[dict[str, Tensor]]:
        """Model inputs with labels on the caption alone."""
        prompt = f"{'<image>' * IMAGE_TOKENS} {CAPTION_PROMPT}"
        for scenes in iter(self._scenes, None):
            texts = [caption(upper_row(scene)) for scene in scenes]
            batch = answering(self.processor.tokenizer, [prompt] * len(texts), texts)
            yield batch | {"pixel_values": self._pixels(scenes)}


def answering(tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """Conversations of one turn each, padded on the right, with labels on the answers alone."""
    texts = [f"USER: {one} ASSISTANT: {other}</s>" for one, other in zip(asked, answers, strict=True)]
    batch: dict[str, Any] = dict(
        tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    )
    ids = batch["input_ids"]
    begins = torch.roll(ids == tokenizer.convert_tokens_to_ids("ASSISTANT"), 2, 1)  # it, and a colon
    labels = ids.where((begins.cumsum(1) > 0) & (batch["attention_mask"] == 1), -100)
    return batch | {"labels": labels}


def make_language(folder: Path, seed: int, steps: int = LANGUAGE_STEPS) -> dict[str, float]:
    """Trains the Llama on text alone and saves it in the folder.

    Returns:
        What ``base.json`` says: of each kind of question, the percentage that it answers rightly of scenes in words.
    """
    torch.manual_seed(seed)
    processor = make_processor(edits.WORDS)
    model = LlamaForCausalLM(language_config(processor))
    train(model, (model(**batch).loss for batch in Texts(processor, seed)), steps, "reading words")
    texts, right = Texts(processor, seed + 1, wrong=0.0), defaultdict[str, list[bool]](list)
    told = [sample_told(texts.rng, images) for images in (1, 2) for _ in range(2 * HELD_OUT)]
    for (_, question), each in zip(told, _right(model, texts.batch(told)).tolist(), strict=True):
        right[question.kind].append(each)
    found = {kind: 100 * sum(each) / len(each) for kind, each in sorted(right.items())}
    model.save_pretrained(folder)
    write_json(folder / BASE, found)
    return found


def untrained(form: Form, processor: LlavaProcessor) -> Any:
    """A LLaVA as the demo's; or a BLIP-2 with a like tower and Llama, its Q-Former of 4 layers and 16 queries."""
    if form == "linear":
        return make_model(processor)
    config = Blip2Config(
        vision_config={**TOWER, "initializer_range": 0.08},
        qformer_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "encoder_hidden_size": WIDTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.08,
            "vocab_size": len(processor.tokenizer),
        },
        text_config=language_config(processor).to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=processor.image_token_id,
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)
    return model


class Sight(nn.Module):
    """The second stage's task, read linearly from a patch's features: what its cell holds, and where the patch is.

    Nobody could find a patch again by features that say only what they show.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.vision_model if hasattr(model, "qformer") else model.model.vision_tower
        self.content, self.place = nn.Linear(WIDTH, len(CONTENTS)), nn.Linear(WIDTH, IMAGE_TOKENS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images float32 (B, 3, 64, 64) to logits of contents, (B, patches, contents)."""
        logits: Tensor = self.content(self._features(pixel_values))
        return logits

    def loss(self, pixel_values: Tensor, contents: Tensor) -> Tensor:
        """Of both answers."""
        features = self._features(pixel_values)
        places = torch.arange(IMAGE_TOKENS).repeat(len(features))
        return _loss(self.content(features), contents) + _loss(self.place(features), places)

    def _features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.tower(pixel_values).last_hidden_state[:, 1:]
        return features


def _loss(logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten())


class Aligning(PatchReader):
    """What each image token shows, by its cosine with the words, whatever the form."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images float32 (B, 3, 64, 64) to logits (B, patches, contents)."""
        tokens = self.model.get_image_features(pixel_values).pooler_output
        tokens = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
        words = self.model.get_input_embeddings()(self.words)
        return self.log_scale.exp() * F.normalize(tokens, dim=-1) @ F.normalize(words, dim=-1).T


def make_base(folder: Path, form: Form, seed: int, language: Path, steps: Sequence[int] = EYES_STEPS) -> dict[str, Any]:
    """Trains the eyes for a Llama, and saves all with a processor in the folder.

    Args:
        folder: written when all is done, with ``base.json``.
        form: of the second look that the model is for.
        seed: of weights and scenes.
        language: the Llama's folder.
        steps: of seeing, of aligning and of captions.

    Returns:
        What ``base.json`` says: shares of held-out patches and captions that are right.
    """
    torch.manual_seed(seed)
    start = time.perf_counter()
    processor = make_processor(edits.WORDS)
    model = untrained(form, processor)
    llama = LlamaForCausalLM.from_pretrained(language)
    decoder = model.get_decoder()  # of BLIP-2 with its head
    getattr(decoder, "model", decoder).load_state_dict(llama.model.state_dict())
    model.tie_weights()
    model.requires_grad_(False)

    held_out = SceneBatches(processor, "held_out", seed + 1, HELD_OUT)
    seeing = Sight(model)
    seeing.requires_grad_(True)
    scenes = SceneBatches(processor, "train", seed)
    train(seeing, (seeing.loss(*batch) for batch in scenes.patches()), steps[0], "seeing")
    seen = {"patches_seen": _read_right(seeing, held_out)}

    seeing.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not BETWEEN.isdisjoint(name.split(".")))
    aligning, captions = Aligning(model, processor), UpperRows(processor, "train", seed, TEXT_BATCH)
    train(aligning, (_loss(aligning(x), y) for x, y in captions.patches()), steps[1], "aligning")
    seen["patches_aligned"] = _read_right(aligning, held_out)
    train(model, (model(**batch).loss for batch in captions.captions()), steps[2], "writing captions")
    told = UpperRows(processor, "held_out", seed + 1, HELD_OUT).captions()
    seen["captions_right"] = _right(model, next(told)).float().mean().item()
    save(model, processor, folder)
    seen["minutes"] = (time.perf_counter() - start) / 60
    write_json(folder / BASE, seen)
    return seen


@torch.no_grad()
def _read_right(reader: nn.Module, scenes: SceneBatches) -> float:
    """Share of the patches under digits."""
    pixels, contents = next(scenes.patches())
    right = reader(pixels).argmax(dim=-1) == contents
    return right[contents != NOTHING].float().mean().item()


@torch.no_grad()
def _right(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Which answers the model would write word by word, bool (B,)."""
    labels = batch["labels"][:, 1:]
    words: Tensor = model(**batch).logits[:, :-1].argmax(dim=-1)
    return ((words == labels) | (labels == -100)).all(1)
