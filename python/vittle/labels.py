"""``vittle labels``: what each token's label and mask are, for a person to see."""

from __future__ import annotations

import html
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vittle.data import Collator, LlavaDataset
from vittle.data.collate import IGNORED
from vittle.files import save_text


@dataclass(frozen=True)
class Look:
    """How the tokens of one kind are shown: what it means, without colours, in a terminal, on a page."""

    meaning: str
    brackets: tuple[str, str]
    ansi: str
    css: str


LOOKS = {
    "response": Look("response: in the loss", ("{", "}"), "32", "background:#cdeccd"),
    "labelled": Look("instruction: in the loss and the text KL", ("[", "]"), "34", "background:#cfe0fb"),
    "instruction": Look("instruction: in the text KL only", ("(", ")"), "36", "background:#e3eef2;color:#456"),
    "image": Look("image: in the vision KL", ("", ""), "35", "background:#f1d9f1"),
    "template": Look("template: in neither", ("", ""), "90", "color:#999"),
}


def spans(collator: Collator, item: Any) -> Iterator[tuple[str, str]]:
    """Runs of tokens of one kind, as (kind, text), in order."""
    batch = collator([item])
    tokenizer, image_id = collator.processor.tokenizer, collator.processor.image_token_id
    columns = (batch["input_ids"][0], batch["labels"][0], batch["instruction_mask"][0])
    tokens = list(zip(*(column.tolist() for column in columns), strict=True))

    def kind(token: tuple[int, int, bool]) -> str:
        id, label, is_instruction = token
        if id == image_id:
            return "image"
        if is_instruction:
            return "labelled" if label != IGNORED else "instruction"
        return "response" if label != IGNORED else "template"

    for name, run in groupby(tokens, kind):
        ids = [id for id, _, _ in run]
        yield name, f"{tokenizer.decode(ids[:1])} x {len(ids)}" if name == "image" else tokenizer.decode(ids)


def in_terminal(samples: Sequence[tuple[str, list[tuple[str, str]]]], colour: bool) -> str:
    """Samples with a legend; in colour, or in brackets where there is none."""

    def paint(kind: str, text: str) -> str:
        look = LOOKS[kind]
        return f"\x1b[{look.ansi}m{text}\x1b[0m" if colour else f"{look.brackets[0]}{text}{look.brackets[1]}"

    lines = [f"{paint(kind, 'text')}  {look.meaning}" for kind, look in LOOKS.items()]
    for title, runs in samples:
        shown = "".join(paint(kind, text) for kind, text in runs)
        if not colour:
            shown = "\n".join(textwrap.fill(line, 80) for line in shown.splitlines())
        lines += ["", f"-- {title}", shown]
    return "\n".join(lines)


def as_page(samples: Sequence[tuple[str, list[tuple[str, str]]]], source: str) -> str:
    """One self-contained HTML page."""

    def paint(kind: str, text: str) -> str:
        return f'<span class="{kind}" title="{LOOKS[kind].meaning}">{html.escape(text)}</span>'

    styles = "".join(f".{kind}{{{look.css};border-radius:3px}}" for kind, look in LOOKS.items())
    legend = "".join(f"<li>{paint(kind, look.meaning)}</li>" for kind, look in LOOKS.items())
    body = "".join(
        f"<h2>{html.escape(title)}</h2><pre>{''.join(paint(kind, text) for kind, text in runs)}</pre>"
        for title, runs in samples
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vittle labels</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "pre{white-space:pre-wrap;font:14px/1.6 ui-monospace,monospace;border-left:3px solid #ddd;padding-left:1rem}"
        f"h1,h2{{font-weight:600}}h2{{font-size:1rem}}ul{{list-style:none;padding:0}}{styles}</style></head><body>"
        f"<h1>Labels of {html.escape(source)}</h1><ul>{legend}</ul>{body}</body></html>\n"
    )


def show(dataset: LlavaDataset, collator: Collator, count: int, page: str | None) -> None:
    """Prints the first samples, or writes them as a page."""
    samples = []
    for index in range(min(count, len(dataset))):
        item = dataset[index]
        samples.append((f"record {index}, id {item['id']}", list(spans(collator, item))))
    if page is not None:
        save_text(Path(page), as_page(samples, str(dataset.path)))
        print(f"{len(samples)} samples are in {page}")
        return
    print(in_terminal(samples, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
