"""Examples that training and evaluation read: what they are, their files, and their tokens.

A file is JSON lines (``.jsonl``) or Parquet (``.parquet``, needs pyarrow) with the columns ``context``,
``question``, ``answer`` and ``task``. The prompt is ``context + question``; the loss is that of the answer's
tokens alone. Further columns say how a generated text is scored, and may be missing: ``metric``, ``answers``,
``classes``, ``max_new_tokens`` and ``stop``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

COLUMNS = ("context", "question", "answer", "task")
SCORING_COLUMNS = ("metric", "answers", "classes", "max_new_tokens", "stop")
METRICS = (
    "tokens",
    "found",
    "any_found",
    "f1",
    "rouge_l",
    "edit_similarity",
    "classification",
    "number",
    "likelihood",
)
"""How a generated text may be scored: see ``flux_ext.evaluation.metrics``."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A prompt (``context + question``), the ``answer`` that should follow it, and the ``task`` it belongs to.

    Raises:
        ValueError: a text has half of a surrogate pair (JSON can write one): no encoding has a form for it; an unknown
            ``metric``; ``max_new_tokens`` below 1; an empty text among ``answers`` or ``classes``.
    """

    context: str
    question: str
    answer: str
    task: str
    metric: str = "tokens"
    """How a generated text is scored, one of ``METRICS``: ``"tokens"`` wants the answer's tokens, ``"likelihood"``
    generates nothing."""
    answers: tuple[str, ...] = ()
    """What the text is compared with; none: the answer without white space around it."""
    classes: tuple[str, ...] = ()
    """All answers that a classification knows."""
    max_new_tokens: int | None = None
    """Tokens to generate; None: as many as the answer has. Not for ``"tokens"``."""
    stop: str = ""
    """The generated text counts up to here, white space before it aside; none: all of it. Not for ``"tokens"``."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (half := _SURROGATE.search(text)):
                    raise ValueError(
                        f"the column {name!r} must be text that UTF-8 can hold, its character {half.start() + 1} is "
                        f"half of a surrogate pair (\\u{ord(half[0]):04x})"
                    )
        if self.metric not in METRICS:
            raise ValueError(f"the column 'metric' must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"the column 'max_new_tokens' must be >= 1, got {self.max_new_tokens}")
        for name, texts in (("answers", self.answers), ("classes", self.classes)):
            if not all(texts):
                raise ValueError(f"the column {name!r} has an empty text")

    @property
    def prompt(self) -> str:
        """What the model reads before it answers."""
        return self.context + self.question

    @property
    def expected(self) -> tuple[str, ...]:
        """The texts that a generated one is compared with."""
        return self.answers or (self.answer.strip(),)


_DEFAULTS = {f.name: f.default for f in fields(Example) if f.default is not MISSING}


class Tokenizer(Protocol):
    """What is asked of a tokenizer; any of Hugging Face's has it."""

    @property
    def pad_token_id(self) -> int | None:
        """What fills the rows of a batch up; None: any token does."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """``{"input_ids": tokens}`` of a text."""


def tokenized(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of the ``example``'s prompt, with the special ones of its ``tokenizer``, and of its answer, without.

    The two texts are tokenised apart and put one behind the other, also where the tokenizer would cut them otherwise if
    it had both: when a model answers, it has the prompt's tokens alone.

    Raises:
        ValueError: one of them has no token.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    if not prompt or not answer:
        raise ValueError(
            f"the example {example.question!r} -> {example.answer!r} of {example.task!r} has {len(prompt)} prompt and "
            f"{len(answer)} answer tokens; both need one"
        )
    return list(prompt), list(answer)


def load_examples(path: str | Path) -> list[Example]:
    """Reads a ``.jsonl`` or ``.parquet`` file at ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or empty, or a line breaks a rule; the message names file, line and
            column.
        ImportError: a Parquet file without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        rows = json_lines(path)
    elif path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        raise ValueError(f"{path}: the name must end in .jsonl or .parquet")
    examples = [_example(row, where, "a line ") for where, row in rows]
    if not examples:
        raise ValueError(f"{path}: the file has no examples")
    return examples


def save_examples(examples: Sequence[Example], path: str | Path) -> None:
    """Writes ``examples`` to ``path``, as JSON lines that :func:`load_examples` reads; of the columns for scoring those
    that say something."""
    with open(path, "w", encoding="utf-8") as file:
        for e in examples:
            scoring = {c: getattr(e, c) for c in SCORING_COLUMNS if getattr(e, c) != _DEFAULTS[c]}
            row = {c: getattr(e, c) for c in COLUMNS} | scoring
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of the file at ``path`` and where each stands, for messages."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin files with a mark
                yield where, json.loads(text.rstrip(), object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise ValueError(f"{where}: not an example ({error})") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError where a key stands twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs pyarrow (pip install 'flux-ext[parquet]')") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [c for c in (*COLUMNS, *SCORING_COLUMNS) if c in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, line {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "not a Parquet file" if number == 0 else f"damaged after line {number}"
        raise ValueError(f"{path}: {what} ({error})") from error


def as_examples(rows: Iterable[Example | Mapping[str, Any]]) -> list[Example]:
    """Examples, from ``rows`` that are examples already or have their columns: dicts, a ``datasets.Dataset``.

    Raises:
        ValueError: a row breaks a rule of the columns; the message names row and column.
    """
    return [row if isinstance(row, Example) else _example(row, f"examples[{i}]") for i, row in enumerate(rows)]


def _example(row: object, where: str, what: str = "") -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {what}must be an object with {', '.join(COLUMNS)}, got {type(row).__name__}")
    for column in COLUMNS:
        if column not in row:
            raise ValueError(f"{where}: the column {column!r} is missing")
        if not isinstance(row[column], str):
            raise ValueError(f"{where}: the column {column!r} must be text, got {type(row[column]).__name__}")
    for column in ("answer", "task"):
        if not row[column]:
            raise ValueError(f"{where}: the column {column!r} is empty")
    if not row["context"] and not row["question"]:
        raise ValueError(f"{where}: the columns 'context' and 'question' are both empty")
    scoring: dict[str, Any] = {}
    for column in SCORING_COLUMNS:
        value, default = row.get(column), _DEFAULTS[column]
        if value is None:  # also what Parquet has where a row has no value
            continue
        if isinstance(default, tuple):
            if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
                raise ValueError(f"{where}: the column {column!r} must be a list of texts, got {value!r}")
            value = tuple(value)
        elif not isinstance(value, str if isinstance(default, str) else int) or isinstance(value, bool):
            rule = "text" if isinstance(default, str) else "a whole number"
            raise ValueError(f"{where}: the column {column!r} must be {rule}, got {type(value).__name__}")
        scoring[column] = value
    try:
        return Example(*(row[c] for c in COLUMNS), **scoring)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
