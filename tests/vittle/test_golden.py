"""Labels and masks token by token: twenty-one hand-written conversations on four chat templates, in golden/.

In a spelling {x} is in the loss, a response's; [x] is in the loss of --loss instruct and in the text KL; (x) is a task
template's, in the text KL only; all else is in neither. <image>x4 is an image. What is cut by the length ends with ~.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from test_collate import item, metaspace, processor
from test_template import CHATML, GEMMA3, LLAMA3

from vittle.data import Collator
from vittle.methods.instruct import TaskTemplates
from vittle.models import CHAT_TEMPLATE

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = {"llava-1.5": CHAT_TEMPLATE, "qwen2.5-vl": CHATML, "llama-3": LLAMA3, "gemma-3": GEMMA3}
TASK = TaskTemplates({"answer with a word.": 9, "which is left?": 9})

CONVERSATIONS: dict[str, list[str]] = {
    "one turn": ["<image>which digit is this?", "a six."],
    "text only": ["which is it?", "six"],
    "two turns": ["<image>which digit?", "six", "what colour?", "it is a colour."],
    "three turns of text": ["which?", "this", "a digit?", "six", "left?", "a"],
    "two images in a turn": ["<image><image>which digit is left?", "six"],
    "two images around text": ["which <image> is this <image> one?", "left"],
    "an image in the second turn": ["which digit?", "six", "<image>is it this?", "it is."],
    "an image in each turn": ["<image>a?", "a", "<image>this?", "six"],
    "an image at the end": ["which digit is this?<image>", "six"],
    "an image alone": ["<image>", "it is a six."],
    "a task template behind the question": ["<image>which digit?\nanswer with a word.", "six"],
    "a task template before the question": ["answer with a word. which digit?<image>", "six"],
    "a task template alone": ["<image>answer with a word.", "six"],
    "two task templates": ["<image>which is left? answer with a word.", "six"],
    "a task template in a response": ["<image>which?", "answer with a word."],
    "a task template inside a sentence": ["<image>what answer with a word. is it?", "six"],
    "a question that only begins like a template": ["<image>which is left one?", "six"],
    "lines": ["<image>which digit?\nthis or a", "it is\na six."],
    "white space": ["<image>  which   digit?  ", "  six  "],
    "letters of other scripts": ["<image>wörd 数字?", "é 六"],
    "a role in the text": ["<image>USER: which?", "ASSISTANT: six"],
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
SYSTEM += "and polite answers to the user's questions. answer with word. USER: ASSISTANT:"
CUT = {"two turns": 49, "lines": 48}
"""Lengths that cut the last tokens, of LLaVA-1.5's template."""


def spell(collator: Collator, chat: Any) -> str:
    batch = collator([chat])
    convert = collator.processor.tokenizer.convert_ids_to_tokens
    words = []
    for id, label, counts in zip(
        *(batch[name][0].tolist() for name in ("input_ids", "labels", "instruction_mask")), strict=True
    ):
        assert label in (-100, id)
        token = convert(id)
        kind = ("[]" if label == id else "()") if counts else "{}" if label == id else ("", "")
        words.append(f"{kind[0]}{token}{kind[1]}")
    runs = [(word, len(list(run))) for word, run in groupby(words)]
    return " ".join(word if count == 1 else f"{word}x{count}" for word, count in runs)


def make(name: str) -> Any:
    """A processor with one of the templates, LLaVA-1.5's with a tokenizer like its own."""
    return processor(TEMPLATES[name], metaspace(SYSTEM) if name == "llava-1.5" else None)


def spellings(name: str) -> str:
    """What golden/<name>.txt must say."""
    process = make(name)
    lines = []
    for title, turns in CONVERSATIONS.items():
        lines += [title, f"    {spell(Collator(process, loss='instruct', task_templates=TASK), item(*turns))}"]
    for title, length in CUT.items() if name == "llava-1.5" else ():
        cut = Collator(process, length, loss="instruct", task_templates=TASK)
        lines += [f"{title}, cut to {length}", f"    {spell(cut, item(*CONVERSATIONS[title]))} ~"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token(name: str) -> None:
    assert spellings(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_response_loss_has_the_responses_of_the_instruct_loss(name: str) -> None:
    process = make(name)
    for turns in CONVERSATIONS.values():
        response, instruct = (
            Collator(process, loss=loss, task_templates=TASK)([item(*turns)]) for loss in ("response", "instruct")
        )
        assert torch.equal(response["instruction_mask"], instruct["instruction_mask"])
        outside = ~response["instruction_mask"]
        assert torch.equal(response["labels"][outside], instruct["labels"][outside])
        assert (response["labels"][~outside] == -100).all()
