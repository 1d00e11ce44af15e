"""Training and evaluation examples: files, tokens, batches.

A file is JSON lines (``.jsonl``) or Parquet (``.parquet``, needs pyarrow) with the columns ``context``,
``question``, ``answer`` and ``task``. The prompt is ``context + question``; the loss is that of the answer's
tokens alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..evaluation.tasks import Example

COLUMNS = ("context", "question", "answer", "task")
IGNORED = -100
"""The label of tokens without a loss, as in transformers."""


def load_examples(path: str | Path) -> list[Example]:
    """Reads a ``.jsonl`` or ``.parquet`` file.

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
        rows = _json_lines(path)
    elif path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        raise ValueError(f"{path}: the name must end in .jsonl or .parquet")
    examples = [_example(row, where) for where, row in rows]
    if not examples:
        raise ValueError(f"{path}: the file has no examples")
    return examples


def save_examples(examples: Sequence[Example], path: str | Path) -> None:
    """Writes JSON lines that :func:`load_examples` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for e in examples:
            file.write(json.dumps({c: getattr(e, c) for c in COLUMNS}, ensure_ascii=False) + "\n")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8").rstrip())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise ValueError(f"{where}: not an example ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs pyarrow (pip install 'flux-ext[parquet]')") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [c for c in COLUMNS if c in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, line {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "not a Parquet file" if number == 0 else f"damaged after line {number}"
        raise ValueError(f"{path}: {what} ({error})") from error


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a line must be an object with {', '.join(COLUMNS)}, got {type(row).__name__}")
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
    try:
        return Example(*(row[c] for c in COLUMNS))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class RouterDataset(Dataset):
    """Examples as tokens: ``{"prompt": [int], "answer": [int], "task": int}``.

    Args:
        examples: what to learn from.
        tokenizer: a Hugging Face tokenizer. The prompt gets its special tokens, the answer none.
        tasks: the tasks' names in order; default: those of the examples, sorted.
        max_length: tokens; longer examples lose some from the middle of the prompt, so that its beginning and the
            question stay.

    Raises:
        ValueError: no examples, or one whose task is not in ``tasks``; on access, an example without tokens or
            whose answer leaves no room for a prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        tasks: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.examples, self.tokenizer, self.max_length = list(examples), tokenizer, max_length
        if not self.examples:
            raise ValueError("examples must not be empty")
        self.tasks = tuple(tasks) if tasks is not None else tuple(sorted({e.task for e in self.examples}))
        self._index = {task: i for i, task in enumerate(self.tasks)}
        for e in self.examples:
            if e.task not in self._index:
                raise ValueError(f"tasks must name the task of every example, and {e.task!r} is not in {self.tasks}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        e = self.examples[i]
        prompt = self.tokenizer(e.prompt)["input_ids"]
        answer = self.tokenizer(e.answer, add_special_tokens=False)["input_ids"]
        if not prompt or not answer:
            raise ValueError(f"example {i} has {len(prompt)} prompt and {len(answer)} answer tokens; both need one")
        if self.max_length is not None and len(prompt) + len(answer) > self.max_length:
            room = self.max_length - len(answer)
            if room < 2:
                raise ValueError(
                    f"max_length {self.max_length} has no room for a prompt beside the {len(answer)} answer tokens "
                    f"of example {i}"
                )
            prompt = prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]
        return {"prompt": prompt, "answer": answer, "task": self._index[e.task]}


@dataclass(frozen=True)
class PaddedCollator:
    """Batches padded on the left, so that the answers end together and few logits are needed.

    Returns ``input_ids``, ``attention_mask`` and ``labels`` ``[B, S]``, ``task_ids`` and ``prompt_lengths``
    ``[B]``, all int64. Without any padding there is no mask.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [[*row["prompt"], *row["answer"]] for row in rows]
        longest = max(map(len, texts))
        labels = [[IGNORED] * len(row["prompt"]) + [*row["answer"]] for row in rows]

        def pad(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
            return torch.tensor([[filler] * (longest - len(x)) + [*x] for x in lists])

        batch = {
            "input_ids": pad(texts, self.pad_token_id),
            "labels": pad(labels, IGNORED),
            **_sequences(rows),
        }
        if min(map(len, texts)) < longest:
            batch["attention_mask"] = pad([[1] * len(x) for x in texts], 0)
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Batches packed into one row without padding, in the form of transformers' ``DataCollatorWithFlattening``.

    Returns ``input_ids``, ``labels`` and ``position_ids``, int64 ``[1, T]``; ``cu_seq_lens_q`` and
    ``cu_seq_lens_k``, int32 ``[B + 1]``; ``max_length_q`` and ``max_length_k``, integers; ``task_ids`` and
    ``prompt_lengths``, int64 ``[B]``.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["prompt"]) + len(row["answer"]) for row in rows]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        texts = [token for row in rows for token in (*row["prompt"], *row["answer"])]
        labels = [x for row in rows for x in ([IGNORED] * len(row["prompt"]) + [*row["answer"]])]
        return {
            "input_ids": torch.tensor([texts]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            **_sequences(rows),
        }


def _sequences(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "task_ids": torch.tensor([row["task"] for row in rows]),
        "prompt_lengths": torch.tensor([len(row["prompt"]) for row in rows]),
    }
