"""Batches token by token, and what is said about records that make none."""

from __future__ import annotations

import json
import pickle
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_template import CHATML, CORPUS, LLAMA3, LLAVA, SPECIAL, TEMPLATES, byte_level, chat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from vittle.data import Collator
from vittle.errors import UserError
from vittle.methods.instruct import TaskTemplates

SIDE = {"height": 4, "width": 4}


@cache
def metaspace(more_words: str = "") -> PreTrainedTokenizerFast:
    """A BPE like LLaVA-1.5's: ▁ for a space and before the text, and bytes for unknown characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False)
    words = f"{CORPUS} {more_words}".split()
    bpe.train_from_iterator([f"{space}{word}" for word in words for space in ("", " ")], trainer)
    state = json.loads(bpe.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    state["model"]["byte_fallback"] = True
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def processor(template: str = LLAVA, tokenizer: Any = None) -> LlavaProcessor:
    """A LLaVA processor that gives each image 4 tokens."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size=SIDE),
        tokenizer or byte_level(),
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def item(*turns: str, id: str | int = "r") -> Any:
    count = sum(turn.count("<image>") for turn in turns)
    return {"id": id, "messages": chat(*turns), "images": [Image.new("RGB", (6, 5), "red")] * count}


def spell(processor: ProcessorMixin, batch: dict[str, Tensor], row: int = 0) -> str:
    """The tokens of a row, [instruction] and {response} tokens in brackets, runs of one token counted."""
    columns = (batch["input_ids"][row], batch["instruction_mask"][row], batch["labels"][row])
    words = []
    for id, is_instruction, label in zip(*(column.tolist() for column in columns), strict=True):
        assert label in (-100, id)
        token = processor.tokenizer.convert_ids_to_tokens(id)
        words.append(f"[{token}]" if is_instruction else f"{{{token}}}" if label == id else token)
    runs = [(word, len(list(run))) for word, run in groupby(words)]
    return " ".join(word if count == 1 else f"{word}x{count}" for word, count in runs)


GOLDEN = {
    "an image first": (
        LLAVA,
        ["<image> which digit is this?", "it is a six."],
        "<s> USER : Ġ <image>x4 Ċ [which] [Ġdigit] [Ġis] [Ġthis] [?] ĠASSISTANT : {Ġit} {Ġis} {Ġa} {Ġsix} {.} {</s>}",
    ),
    "several turns": (
        LLAVA,
        ["<image> which digit?", "six", "which colour is it", "it is left"],
        "<s> USER : Ġ <image>x4 Ċ [which] [Ġdigit] [?] ĠASSISTANT : {Ġsix} {</s>} "
        "USER : [Ġwhich] [Ġcolour] [Ġis] [Ġit] ĠASSISTANT : {Ġit} {Ġis} {Ġleft} {</s>}",
    ),
    "text only": (
        LLAVA,
        ["which is left", "this"],
        "<s> USER : [Ġwhich] [Ġis] [Ġleft] ĠASSISTANT : {Ġthis} {</s>}",
    ),
    "an image alone": (
        LLAVA,
        ["<image>", "a six"],
        "<s> USER : Ġ <image>x4 Ċ ASSISTANT : {Ġa} {Ġsix} {</s>}",
    ),
    "an image in the middle": (
        CHATML,
        ["which digit is <image> this?", "six"],
        "<s> <|im_start|> system Ċ You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> Ċ "
        "<|im_start|> user Ċ [which] [Ġdigit] [Ġis] <image>x4 [this] [?] <|im_end|> Ċ "
        "<|im_start|> assistant Ċ {six} {<|im_end|>} Ċ",
    ),
    "two images in two turns": (
        LLAMA3,
        ["<image> which digit", "six", "is this <image> left?", "it is"],
        "<s> <|start_header_id|> user <|end_header_id|> Ċx2 <image>x4 [which] [Ġdigit] <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> Ċx2 {six} {<|eot_id|>} "
        "<|start_header_id|> user <|end_header_id|> Ċx2 [is] [Ġthis] <image>x4 [left] [?] <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> Ċx2 {it} {Ġis} {<|eot_id|>}",
    ),
    "white space of its own": (
        LLAVA,
        ["which  digit", "it\n is"],
        "<s> USER : [Ġwhich] [Ġ] [Ġdigit] ĠASSISTANT : {Ġit} {Ċ} {Ġis} {</s>}",
    ),
    "the template's space apart from the answer": (
        LLAVA,
        ["which?", "é"],
        "<s> USER : [Ġwhich] [?] ĠASSISTANT : Ġ {Ã} {©} {</s>}",
    ),
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(("template", "turns", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_labels_and_instruction_mask(template: str, turns: list[str], expected: str, trim_offsets: bool) -> None:
    llava = processor(template, byte_level(trim_offsets))
    assert spell(llava, Collator(llava)([item(*turns)])) == expected


def test_labels_and_instruction_mask_with_a_tokenizer_like_llavas() -> None:
    llava = processor(LLAVA, metaspace())
    batch = Collator(llava)([item("<image> which digit?", "it\n is 6", "which colour", "a  six")])
    assert spell(llava, batch) == (
        "▁USER: ▁ <image>x4 <0x0A> [wh] [ich] [▁digit] [?] ▁ASSISTANT: "
        "{▁it} {<0x0A>} {▁is} {▁} {<0x36>} {</s>} "
        "USER : [▁which] [▁colour] ▁ASSISTANT: {▁a} {▁} {▁six} {</s>}"
    )


def test_a_mixed_batch_is_padded_on_the_right() -> None:
    llava = processor()
    batch = Collator(llava)([item("which?", "six"), item("<image> <image> which is left?", "this")])
    assert spell(llava, batch, 0) == "<s> USER : [Ġwhich] [?] ĠASSISTANT : {Ġsix} {</s>} <pad>x13"
    assert spell(llava, batch, 1) == (
        "<s> USER : Ġ <image>x4 Ċ <image>x4 Ċ [which] [Ġis] [Ġleft] [?] ĠASSISTANT : {Ġthis} {</s>}"
    )
    assert batch["attention_mask"].tolist() == [[1] * 9 + [0] * 13, [1] * 22]
    assert batch["pixel_values"].shape == (2, 3, 4, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.int64
    assert batch["instruction_mask"].dtype == torch.bool


def test_a_batch_without_images_has_no_pixel_values() -> None:
    batch = Collator(processor())([item("which?", "six")])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "instruction_mask"}


def test_what_else_the_processor_returns_is_kept() -> None:
    anyres = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 4}, crop_size=SIDE, image_grid_pinpoints=[[4, 8], [8, 4]]),
        byte_level(),
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    tall = {**item("<image> which?", "six"), "images": [Image.new("RGB", (4, 8))]}
    batch = Collator(anyres)([tall, item("<image> which?", "six")])
    assert batch["image_sizes"].tolist() == [[8, 4], [5, 6]]
    assert "<image>x16 Ċ [which] [?] ĠASSISTANT : {Ġsix} {</s>}" in spell(anyres, batch, 0)
    assert "<image>x10 Ċ [which] [?] ĠASSISTANT : {Ġsix} {</s>} <pad>x6" in spell(anyres, batch, 1)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_token_ids_are_the_processors_own(template: str) -> None:
    llava, record = processor(template), item("<image> which digit?", "six", "is it?", "it is")
    collator = Collator(llava)
    text = collator.template.render(record["messages"]).text
    own = llava(text=text, images=record["images"], add_special_tokens=not text.startswith("<s>"))
    assert collator([record])["input_ids"].tolist() == own["input_ids"]
    assert own["input_ids"][0].count(llava.tokenizer.bos_token_id) == 1


ENDINGS = {"llava": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}
words = st.text(st.sampled_from("a six?.:!'  \n\té漢🙂\u0301USER"), min_size=1, max_size=12)
texts = words.map(str.strip).filter(bool)


@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    tokenizer=st.sampled_from([byte_level(False), byte_level(True), metaspace()]),
    turns=st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=4),
)
def test_tokens_decode_back_to_the_turns(family: str, tokenizer: Any, turns: list[tuple[str, str, int]]) -> None:
    record = item(*(turn for q, a, images in turns for turn in ("<image>" * images + q, a)))
    batch = Collator(processor(TEMPLATES[family], tokenizer))([record, item("which?", "six")])
    ids, labels, instruction = (batch[key][0] for key in ("input_ids", "labels", "instruction_mask"))

    assert decoded_runs(tokenizer, ids, labels != -100) == [a + ENDINGS[family] for _, a, _ in turns]
    assert decoded_runs(tokenizer, ids, instruction) == [q for q, _, _ in turns]
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 4 * sum(n for *_, n in turns)

    for listed in ({}, {turns[0][0]: 2}):  # with all instructions, and without the first question
        instruct = Collator(
            processor(TEMPLATES[family], tokenizer), loss="instruct", task_templates=TaskTemplates(listed)
        )([record])
        both = instruct["labels"][0] != -100
        assert torch.equal(instruct["instruction_mask"][0], instruction[: len(both)])
        response = (labels != -100)[: len(both)]
        assert not (response & ~both).any() and not (both & ~response & ~instruction[: len(both)]).any()
        if not listed:
            assert torch.equal(both, response | instruction[: len(both)])


def decoded_runs(tokenizer: Any, ids: Tensor, mask: Tensor) -> list[str]:
    runs = [
        [id for id, _ in run] for flag, run in groupby(zip(ids, mask, strict=True), lambda pair: bool(pair[1])) if flag
    ]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False).strip() for run in runs]


def test_truncation_is_from_the_right() -> None:
    llava = processor()
    record = item("<image> which?", "it is a six")
    for max_length in (14, 15, 16):
        batch = Collator(llava, max_length)([record, item("which?", "six")])
        answer = " ".join(["{Ġit}", "{Ġis}", "{Ġa}"][: max_length - 13])
        assert batch["attention_mask"].shape == (2, max_length)
        assert spell(llava, batch) == f"<s> USER : Ġ <image>x4 Ċ [which] [?] ĠASSISTANT : {answer}"


CUTS = {
    "the answer": (["<image> which?", "six"], 13, 14),
    "image tokens": (["<image> which?", "six"], 6, 14),
    "a later image": (["which?", "six", "<image> this?", "a"], 9, 16),
    "a later image's last token": (["which?", "six", "<image> this?", "a"], 15, 16),
}


@pytest.mark.parametrize(("turns", "max_length", "needed"), CUTS.values(), ids=CUTS)
def test_a_cut_that_loses_too_much_is_refused(turns: list[str], max_length: int, needed: int) -> None:
    record = item(*turns, id="long")
    with pytest.raises(UserError) as refusal:
        Collator(processor(), max_length)([record, item("is it?", "a")])
    assert str(refusal.value) == (
        f"record 'long': max_length {max_length} cuts image tokens or the whole answer; "
        f"raise max_length to {needed} or more"
    )
    Collator(processor(), needed)([record])


def test_a_template_that_drops_images_is_refused() -> None:
    silent = LLAVA.replace("<image>\n", "")
    with pytest.raises(UserError) as refusal:
        Collator(processor(silent))([item("<image> which?", "six", id=3)])
    assert str(refusal.value) == (
        "record 3: its rendered chat has 0 <image> placeholder(s) and 1 image(s); "
        "there must be one placeholder per image"
    )


def test_an_unfit_template_is_refused_with_the_record() -> None:
    with pytest.raises(UserError, match="record 'r': the chat template refuses the conversation: roles must"):
        Collator(processor(TEMPLATES["gemma3"]))([item("q", "a") | {"messages": chat("q", "a")[1:]}])


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level()._tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match="has no padding token; set its `pad_token`"):
        Collator(processor(tokenizer=tokenizer))


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match="is a slow tokenizer; it must be a fast one"):
        Collator(processor())


def test_a_processor_that_hides_its_replacements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlavaProcessor, "__call__", lambda *_, **__: {"input_ids": torch.zeros(1, 1)})
    with pytest.raises(UserError, match="LlavaProcessor does not tell where it puts image tokens"):
        Collator(processor())([item("q", "a")])


def test_a_pickled_collator_collates_the_same() -> None:
    collator, items = Collator(processor()), [item("<image> which?", "six")]
    batch, again = collator(items), pickle.loads(pickle.dumps(collator))(items)
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)
