"""L2T (arXiv 2503.22215; LIT in its first version): the loss also covers instruction tokens, templates excluded.

The objective is the response's negative log-likelihood plus the instruction's, unweighted (Eq. 2): here one mean over
all labelled tokens. Excluded are the system template (system prompt, role tags, format tokens), which
:class:`vittle.data.ChatTemplate` tells apart, and the task templates: the sentences that the instructions of the whole
training file repeat most. The paper names neither cut-off nor splitter; both are stated here.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vittle.errors import UserError
from vittle.files import write_text

Loss = Literal["response", "instruct"]

FILE = "task_templates.json"

_BREAK = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
"""Between sentences: white space after a full stop, an exclamation or a question mark; or the end of a line."""


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where each sentence of a text starts and ends, without the white space around it."""
    start = 0
    for gap in (*_BREAK.finditer(text), None):
        end = gap.start() if gap else len(text)
        stripped = text[start:end].strip()
        if stripped:
            first = text.index(stripped, start)
            yield first, first + len(stripped)
        start = gap.end() if gap else end


@dataclass(frozen=True)
class TaskTemplates:
    """The sentences of instructions that the loss leaves out, with how often the training file has each."""

    counts: Mapping[str, int]

    @classmethod
    def count(cls, instructions: Iterable[str], most_frequent: int) -> TaskTemplates:
        """The most frequent sentences of a training file's instructions; a sentence that stands once is none."""
        counter = Counter(text[i:j] for text in instructions for i, j in sentences(text))
        return cls({sentence: n for sentence, n in counter.most_common(most_frequent) if n > 1})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TaskTemplates:
        """The list that :meth:`write` wrote, as somebody may have edited it.

        Raises:
            UserError: the file cannot be read or is not such a list.
        """
        try:
            counts = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); must be an object of sentences and counts") from None
        if not isinstance(counts, dict) or not all(isinstance(n, int) for n in counts.values()):
            raise UserError(f"{path} must hold an object of sentences and counts, as {FILE} does")
        return cls(counts)

    def write(self, folder: Path) -> None:
        """Writes ``task_templates.json``: an object of sentences and counts, the most frequent first."""
        text = json.dumps(dict(self.counts), indent=1, ensure_ascii=False) + "\n"
        write_text(folder / FILE, text)

    def spans(self, instruction: str) -> list[tuple[int, int]]:
        """Where an instruction has them."""
        return [(i, j) for i, j in sentences(instruction) if instruction[i:j] in self.counts]
