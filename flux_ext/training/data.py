"""Examples as tokens, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..examples import Example, Tokenizer, as_examples, tokenized
from ..routers.collection import FluxRouters

IGNORED = -100
"""The label of tokens without a loss, as in transformers."""

TOO_SHORT = (
    "the longest example has {} tokens, and the sink and window of sparse attention show all of them: take longer "
    "prompts, or a smaller window"
)
HELD_OUT = 128
"""Sequences to calibrate on that are enough: the mean of so many differences is known to about 0.007 nats."""


class Tokens(TypedDict):
    """One example as tokens."""

    prompt: list[int]
    answer: list[int]
    task: int
    """Index into the dataset's ``tasks``."""


class RouterDataset(Dataset[Tokens]):
    """Examples as :class:`Tokens`.

    Args:
        examples: what to learn from: each an :class:`~flux_ext.examples.Example`, or a dict with the columns
            ``context``, ``question``, ``answer`` and ``task``.
        tokenizer: a Hugging Face tokenizer, see :func:`~flux_ext.examples.tokenized`.
        tasks: the tasks' names in order; default: those of the examples, sorted.
        max_length: tokens; longer examples lose some from the middle of the prompt, so that its beginning and the
            question stay.

    Raises:
        ValueError: no examples, one that lacks a column, or one whose task is not in ``tasks``; on access, an example
            without tokens or whose answer leaves no room for a prompt.
    """

    def __init__(
        self,
        examples: Iterable[Example | Mapping[str, Any]],
        tokenizer: Tokenizer,
        tasks: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.examples, self.tokenizer, self.max_length = as_examples(examples), tokenizer, max_length
        if not self.examples:
            raise ValueError("examples must not be empty")
        self.tasks = tuple(tasks) if tasks is not None else tuple(sorted({e.task for e in self.examples}))
        self._index = {task: i for i, task in enumerate(self.tasks)}
        for e in self.examples:
            if e.task not in self._index:
                raise ValueError(f"tasks must name the task of every example, and {e.task!r} is not in {self.tasks}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Tokens:
        e = self.examples[i]
        prompt, answer = tokenized(e, self.tokenizer)
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
    ``[B]``, all int64. Padding is ``pad_token_id``; without any there is no mask.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
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

    def __call__(self, rows: Sequence[Tokens]) -> dict[str, Any]:
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


def _sequences(rows: Sequence[Tokens]) -> dict[str, Tensor]:
    return {
        "task_ids": torch.tensor([row["task"] for row in rows]),
        "prompt_lengths": torch.tensor([len(row["prompt"]) for row in rows]),
    }


def nothing_hidden(data: Any, routers: FluxRouters) -> int | None:
    """Tokens of the longest example where no example is so long that sparse routes would hide any key from it, so that
    there is nothing to learn or to measure; else None.

    Args:
        data: a :class:`RouterDataset`; it is read up to the first example that is long enough.
        routers: that are to learn or to be measured.
    """
    longest = 0
    for i in range(len(data)):
        longest = max(longest, len(data[i]["prompt"]) + len(data[i]["answer"]))
        if routers.config.hides_any(longest):
            return None
    return longest


def _digest(e: Example) -> bytes:
    text = "\0".join((e.task, e.context, e.question, e.answer))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def digest(examples: Iterable[Example]) -> str:
    """Of what examples hold, and their order: the same for the same data only."""
    return hashlib.blake2b(b"".join(map(_digest, examples)), digest_size=8).hexdigest()


def hold_out(examples: Sequence[Example], count: int = HELD_OUT) -> tuple[list[Example], list[Example]]:
    """Splits examples into those to train on and those to calibrate on: of each task an eighth of its different
    examples, together at most ``count``, equally many where there are enough.

    Which ones is told by a digest of what they hold: the same file gives the same parts, so that a training may be
    resumed. An example that is there several times is held out as one, and none of its copies is trained on.
    """
    different: dict[str, dict[bytes, Example]] = {}
    for e in examples:
        different.setdefault(e.task, {}).setdefault(_digest(e), e)
    tasks = sorted(different, key=lambda task: (len(different[task]), task))  # what the small ones leave, others get
    held: dict[bytes, Example] = {}
    for place, task in enumerate(tasks):
        share = (count - len(held)) // (len(tasks) - place)
        for key in sorted(different[task])[: min(len(different[task]) // 8, share)]:
            held[key] = different[task][key]
    train = [e for e in examples if _digest(e) not in held]
    return train, [e for task in different.values() for key, e in task.items() if key in held]
