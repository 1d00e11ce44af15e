"""Text in which sentences are hidden, or that is to be continued: as words or lines, of any length."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

_SENTENCE_END = re.compile(r"([.!?:][\"')\]]*\s*|\n\s*)$")


class Haystack:
    """Documents as units, words of prose or lines of code, in one line that is gone along round and round."""

    def __init__(self, documents: Sequence[str], unit: str) -> None:
        """``unit``: ``"word"`` or ``"line"``."""
        self.documents = [_words(text) if unit == "word" else _lines(text) for text in documents]
        self.documents = [units for units in self.documents if units]
        self.units = [unit for units in self.documents for unit in units]
        if not self.units:
            raise ValueError("the text has no words")

    def take(self, first: int, count: int) -> list[str]:
        """``count`` units from the ``first`` on."""
        return [self.units[i % len(self.units)] for i in range(first, first + count)]

    @cached_property
    def starts(self) -> list[int]:
        """Where a sentence, or a line, starts."""
        return sentence_starts(self.units)

    @cached_property
    def text(self) -> str:
        """All of it."""
        return "".join(self.units)

    @cached_property
    def vocabulary(self) -> list[str]:
        """All plain words of 4 to 10 letters, sorted."""
        return sorted(set(re.findall(r"\b[a-z]{4,10}\b", self.text)))


def _words(text: str) -> list[str]:
    paragraphs = [paragraph.split() for paragraph in re.split(r"\n\s*\n", text)]
    return [w + " " if i + 1 < len(p) else w + "\n\n" for p in paragraphs for i, w in enumerate(p)]


def _lines(text: str) -> list[str]:
    return [line.rstrip() + "\n" for line in text.splitlines()]


def sentence_starts(units: Sequence[str]) -> list[int]:
    """The units before which a sentence can be put."""
    return [i for i in range(len(units)) if i == 0 or _SENTENCE_END.search(units[i - 1])]


def hide(units: Sequence[str], notes: Sequence[tuple[float, str]]) -> str:
    """The text of the units with sentences put in: each at a depth in [0, 1), at the start of a sentence, in order."""
    starts = sentence_starts(units) or [0]
    pieces, done = [], 0
    for depth, note in sorted(notes, key=lambda x: x[0]):
        place = starts[bisect_right(starts, depth * len(units)) - 1]
        pieces += [*units[done:place], note + " "]
        done = place
    return "".join([*pieces, *units[done:]])
