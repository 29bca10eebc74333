"""Whose each character of a rendered chat is, for chat templates of four families."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vittle.data.template import ChatTemplate, Kind
from vittle.errors import UserError

# LLaVA-1.5's public template: images first, a space after every text, and nothing that ends an answer.
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
# ChatML as Qwen2-VL has it, with its system turn.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
)
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "llama3": LLAMA3, "gemma3": GEMMA3}

REMEDY = "set the processor's chat_template to one that only appends what it is given"

CORPUS = (
    "USER: ASSISTANT: system user assistant model You are a helpful assistant. "
    "which digit is this? it is a six. what colour is the left one"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]


@cache
def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the words of the corpus, and puts <s> before a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([f"{space}{word}" for word in CORPUS.split() for space in ("", " ")], trainer)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), start])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def chat(*turns: str) -> list[dict[str, Any]]:
    """A conversation that begins with the user; `<image>` between spaces is an image."""
    return [{"role": ("user", "assistant")[i % 2], "content": parts(turn)} for i, turn in enumerate(turns)]


def parts(turn: str) -> list[dict[str, str]]:
    pieces = (piece.strip() for piece in turn.replace("<image>", "|<image>|").split("|"))
    return [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in pieces if p]


def marked(template: str, *turns: str) -> str:
    """The rendered chat with [instructions] and {responses} in brackets."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level()._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    text, spans = ChatTemplate(tokenizer).render(chat(*turns))
    for start, end, kind in reversed(spans):
        left, right = {Kind.INSTRUCTION: "[]", Kind.RESPONSE: "{}"}[kind]
        text = text[:start] + left + text[start:end] + right + text[end:]
    return text


TURNS = ("one <image> two", "user", "one", "ASSISTANT: one")
EXPECTED = {
    "llava": "USER: <image>\n[one] [two] ASSISTANT: {user</s>}USER: [one] ASSISTANT: {ASSISTANT: one</s>}",
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n[one]<image>[two]<|im_end|>\n<|im_start|>assistant\n{user<|im_end|>}\n"
        "<|im_start|>user\n[one]<|im_end|>\n<|im_start|>assistant\n{ASSISTANT: one<|im_end|>}\n"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n[one]<image>[two]<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{user<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\n[one]<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{ASSISTANT: one<|eot_id|>}"
    ),
    "gemma3": (
        "<s><start_of_turn>user\n[one]<image>[two]<end_of_turn>\n<start_of_turn>model\n{user<end_of_turn>}\n"
        "<start_of_turn>user\n[one]<end_of_turn>\n<start_of_turn>model\n{ASSISTANT: one<end_of_turn>}\n"
    ),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_spans_of_each_family(family: str) -> None:
    """The texts repeat each other and the templates' own words, which a mere search would take them for."""
    assert marked(TEMPLATES[family], *TURNS) == EXPECTED[family]


def test_the_end_of_turn_may_stand_off_the_answer() -> None:
    llama2 = (
        "{% for message in messages %}{% set text = message['content'][0]['text'] %}"
        "{{ '<s>[INST] ' + text + ' [/INST]' if message['role'] == 'user' else ' ' + text + ' </s>' }}"
        "{% endfor %}"
    )
    expected = "<s>[INST] [q] [/INST] {a </s>}<s>[INST] [q] [/INST] {b </s>}"
    assert marked(llama2, "q", "a", "q", "b") == expected


def test_only_spaces_give_way_to_an_eos_token() -> None:
    alpaca = (
        "{% for message in messages %}{{ '### ' + message['role'] + ':\n' }}"
        "{{ message['content'][0]['text'] + ' \n\n' }}{% endfor %}"
    )
    assert marked(alpaca, "q", "a") == "### user:\n[q] \n\n### assistant:\n{a</s>}\n\n"


TEXT = "message['content'][0]['text']"
LOOP = "{% for message in messages %}BODY{% endfor %}"
BAD_TEMPLATES = {
    "rewrites a turn": (
        "{{ messages | length }}" + LOOP.replace("BODY", f"{{{{ {TEXT} }}}}"),
        f"the chat template rewrites earlier turns once turn 2 follows; {REMEDY}",
    ),
    "leaves texts out": (
        LOOP.replace("BODY", "{{ message['role'] }}"),
        f"the chat template does not write each text of the conversation once; {REMEDY}",
    ),
    "writes a text twice": (
        LOOP.replace("BODY", f"{{{{ {TEXT} + {TEXT} }}}}"),
        f"the chat template does not write each text of the conversation once; {REMEDY}",
    ),
    "prints the list of parts": (
        LOOP.replace("BODY", "{{ message['content'] }}"),
        f"the chat template does not write each text of the conversation once; {REMEDY}",
    ),
    "alters a text": (
        LOOP.replace("BODY", f"{{{{ {TEXT}.upper() }}}}"),
        f"the chat template alters the texts of the conversation; {REMEDY}",
    ),
    "takes strings only": (
        LOOP.replace("BODY", "{{ 'Q: ' + message['content'] }}"),
        'the chat template refuses the conversation: can only concatenate str (not "list") to str',
    ),
    "raises": (
        "{{ raise_exception('no images here') }}",
        "the chat template refuses the conversation: no images here",
    ),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_an_unfit_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        marked(template, "question", "answer")
    assert str(refusal.value) == message


def test_there_must_be_a_template_and_an_end() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level()._tokenizer)
    with pytest.raises(UserError, match="has no chat template; set its `chat_template`"):
        ChatTemplate(tokenizer)
    tokenizer.chat_template = LLAVA
    with pytest.raises(UserError, match="neither the chat template nor the tokenizer has a token that ends"):
        ChatTemplate(tokenizer).render(chat("q", "a"))
