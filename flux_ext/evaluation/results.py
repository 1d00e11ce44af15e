"""What single examples gave, and the file that keeps it: an interrupted evaluation goes on from there.

The file is JSON lines: first ``{"digest": ...}``, which stands for model, routers, examples and options; then a
line per example and mode, written batch by batch; at the end ``{"complete": true}``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import nn

from ..examples import Example, Tokenizer
from ..models import patching

Mode = Literal["dense", "full", "sparse", "routed"]
MODES: tuple[Mode, ...] = ("dense", "full", "sparse", "routed")
"""In the order of tables: full attention everywhere, every route full, every route sparse, as the routers decide."""


def modes_of(model: nn.Module) -> tuple[Mode, ...]:
    """What can be told apart in a patched model: all modes, or, where the full mode is full attention and every route
    full is dense, all but ``"full"``.

    Raises:
        ValueError: the model is not patched.
    """
    dense = patching.get_routers(model).config.full == "full"
    return tuple(mode for mode in MODES if mode != "full" or not dense)


@dataclass(frozen=True)
class Result:
    """What one example gave in one mode."""

    mode: Mode
    example: int
    """Its position among the examples."""
    score: float | None
    """Of the generated text, by the example's metric, in [0, 1]; None where nothing was generated."""
    text: str | None
    """The generated text, likewise."""
    nats: float | None
    """Negative log-likelihood of the answer; None where it was not asked for."""
    kv_bytes: float
    """See :class:`~flux_ext.evaluation.Score`; of a batch the mean."""
    full_share: tuple[float, ...]
    """Share of full attention of each routed layer."""
    seconds: float
    """Of its batch, over the number of its examples."""


class ResultsFile:
    """Results that are on disk as soon as they are known."""

    def __init__(self, path: Path, digest: str) -> None:
        """Opens the file, or begins a new one.

        Raises:
            ValueError: the file holds unfinished results of another evaluation, or something else.
        """
        self.path = path
        self.results: list[Result] = []
        self.complete = False
        if path.exists() and path.stat().st_size:
            self._read(digest)
        if not self.results:
            with _written_whole(path) as file:
                file.write(json.dumps({"digest": digest}) + "\n")

    def _read(self, digest: str) -> None:
        lines = self.path.read_bytes().split(b"\n")
        whole = lines[:-1]  # a process that was killed while writing leaves part of a line behind the last break
        try:
            head, *rows = [json.loads(line) for line in whole]
            found = head["digest"]
            self.complete = bool(rows) and rows[-1] == {"complete": True}
            results = [_result(row) for row in (rows[:-1] if self.complete else rows)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} exists and is not a file of results ({error}): give another name") from None
        if found != digest:
            if results and not self.complete:
                raise ValueError(
                    f"{self.path} holds unfinished results of another model, other data or options: remove it, or give "
                    "another name"
                )
            self.complete = False
            return
        self.results = results
        if lines[-1]:
            with open(self.path, "rb+") as file:
                file.truncate(sum(len(line) + 1 for line in whole))

    def add(self, results: Sequence[Result]) -> None:
        """Appends the results of a batch."""
        self.results += results
        self._append(asdict(r) for r in results)

    def finish(self) -> None:
        """Says that nothing is missing."""
        if not self.complete:
            self.complete = True
            self._append([{"complete": True}])

    def _append(self, rows: Iterable[object]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of an older one when it is complete."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        yield file
    os.replace(beside, path)


def _result(row: dict[str, object]) -> Result:
    if set(row) != {f.name for f in fields(Result)}:
        raise ValueError(f"a line has the columns {', '.join(row)}")
    return Result(**{**row, "full_share": tuple(row["full_share"])})  # type: ignore[arg-type]


def digest(model: nn.Module, tokenizer: Tokenizer, examples: Sequence[Example], options: dict[str, object]) -> str:
    """A name for an evaluation: another model, other routers, examples or options give another one.

    Of each parameter and buffer some hundred values count, so that large models are told apart in a moment.
    """
    sha = hashlib.sha256()
    sha.update(repr(options).encode())
    sha.update(repr(patching.get_routers(model).config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // 256)].cpu().contiguous()
        sha.update(some.view(torch.uint8).numpy().tobytes())
    for example in examples:
        sha.update(repr(example).encode())
    sha.update(repr(list(tokenizer(examples[0].prompt)["input_ids"])).encode())
    return sha.hexdigest()
