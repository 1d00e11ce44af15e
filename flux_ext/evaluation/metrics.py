"""How a generated text is scored against what was expected: numbers in [0, 1] that need nothing but the texts.

================== ==================================================================================================
metric             the score
================== ==================================================================================================
found              the share of the expected texts that stand somewhere in it (RULER's tasks with one or several
                   answers)
any_found          1 if one of them does (RULER's questions)
f1                 words in common, as in SQuAD and LongBench; the best over the expected texts
rouge_l            the longest common subsequence of words (ROUGE-L, F1, no stemming); the best
edit_similarity    the longest common subsequence of characters of its first line that is no comment; the best
classification     1 / the number of classes named, if the right one is among them
number             the share of the numbers in it that are the expected one
================== ==================================================================================================

Two further metrics are not of texts: ``tokens`` compares tokens, ``likelihood`` generates none (``runner.py``).

Upper and lower case are the same. Chinese, Japanese and Korean are written without spaces: there a character counts as
a word.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ..examples import Example

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)
_ARTICLES = {"a", "an", "the"}
_COMMENT = re.compile("`|#|//")


def counted(text: str, example: Example) -> str:
    """The part of a generated text that counts: up to the example's ``stop``."""
    if not example.stop:
        return text
    return text.lstrip().split(example.stop, 1)[0]


def score(text: str, example: Example) -> float:
    """What a generated text is worth, in [0, 1], by the example's own metric.

    Raises:
        ValueError: its metric is not one of texts.
    """
    if example.metric not in TEXT_METRICS:
        raise ValueError(f"metric must be one of {', '.join(TEXT_METRICS)}, got {example.metric!r}")
    return TEXT_METRICS[example.metric](counted(text, example), example)


def found(text: str, example: Example) -> float:
    """The share of the expected texts that stand somewhere in the text."""
    text = text.lower()
    return sum(answer.lower() in text for answer in example.expected) / len(example.expected)


def any_found(text: str, example: Example) -> float:
    """1 if one of the expected texts stands somewhere in the text, else 0."""
    return float(found(text, example) > 0)


def f1(text: str, example: Example) -> float:
    """Harmonic mean of precision and recall of words, without articles and punctuation; the best."""

    def words(text: str) -> list[str]:
        spaced = text.lower().translate(str.maketrans("", "", string.punctuation))
        return [w for w in _WORD.findall(spaced) if w not in _ARTICLES]

    def one(said: Sequence[str], wanted: Sequence[str]) -> float:
        common = (Counter(said) & Counter(wanted)).total()
        return 2 * common / (len(said) + len(wanted)) if common else 0.0

    said = words(text)
    return max(one(said, words(answer)) for answer in example.expected)


def rouge_l(text: str, example: Example) -> float:
    """ROUGE-L's F1; the best."""
    said = _WORD.findall(text.lower())
    return max(_overlap(said, _WORD.findall(answer.lower())) for answer in example.expected)


def edit_similarity(text: str, example: Example) -> float:
    """``1 - (insertions + deletions) / (both lengths)`` of the first line of code; the best."""
    lines = [line for line in text.split("\n") if line.strip() and not _COMMENT.search(line)]
    said = lines[0].strip() if lines else ""
    return max(_overlap(said, answer.strip()) for answer in example.expected)


def classification(text: str, example: Example) -> float:
    """1 over the number of classes that the text names, if the right one is among them.

    A class whose name is only part of the right one's does not count beside it.
    """
    said = text.lower()
    named = {c.lower() for c in example.classes if c.lower() in said}

    def one(right: str) -> float:
        return 1 / sum(c == right or c not in right for c in named) if right in named else 0.0

    return max(one(answer.lower()) for answer in example.expected)


def number(text: str, example: Example) -> float:
    """The share of the text's whole numbers that are the first one of the expected text; the best."""
    said = [int(n) for n in re.findall(r"\d+", text)]

    def one(answer: str) -> float:
        wanted = re.search(r"\d+", answer)
        return said.count(int(wanted[0])) / len(said) if said and wanted else 0.0

    return max(map(one, example.expected))


TEXT_METRICS: dict[str, Callable[[str, Example], float]] = {
    f.__name__: f for f in (found, any_found, f1, rouge_l, edit_similarity, classification, number)
}


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """``2 * longest common subsequence / (len(a) + len(b))``; of characters, or of words."""
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))
