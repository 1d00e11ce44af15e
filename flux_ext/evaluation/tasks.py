"""Two tasks over real source code: one needs a far look back, the other does not.

Every example has four texts, the columns of the JSON lines files that training and evaluation read and write:

======== ============================================== =========================
column   retrieval                                      continuation
======== ============================================== =========================
context  code with facts hidden in it as comment lines, code
         after a line that says so
question asks for one of the facts, far behind          empty
answer   the value of that fact, four digits            the code that comes next
task     ``"retrieval"``                                ``"continuation"``
======== ============================================== =========================

The prompt is ``context + question`` with nothing between, and the answer follows at once. A
retrieval prompt::

    # Notes with codes are hidden in the source below. Remember them: the question comes at the end.
    ...
    # note: the code of kqzw is 4827
    ...

    # question: one of the notes in the source above tells the code of kqzw; what is it?
    # answer: the code of kqzw is 4827

The code is what every machine with Python has, the sources of the standard library. Only plain ASCII files are read,
so that a character is a byte, and with a byte-level tokenizer a token: ``length`` counts all three, and every prompt of
one call has exactly that length. The same arguments give the same examples wherever the same Python is installed.
"""

from __future__ import annotations

import hashlib
import random
import string
import sysconfig
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

from ..examples import Example

RETRIEVAL, CONTINUATION = TASKS = ("retrieval", "continuation")
SPLITS = ("train", "heldout")

# Not the library's own code, or not code: installed packages, tests, generated tables and help texts.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_HELDOUT_SHARE = 0.08


def is_heldout(name: str) -> bool:
    """Whether the file of this name (its path inside the standard library) is kept from training.

    A hash of the name decides, so a file is on the same side in every Python version.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELDOUT_SHARE * 2**32


@lru_cache
def corpus(split: str = "train", root: Path | None = None) -> Mapping[str, str]:
    """The standard library's sources, ``{name: text}``, in the order of the names.

    Args:
        split: ``"train"`` or ``"heldout"``; no file is in both.
        root: another folder of Python sources to read instead.

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    root = Path(root or sysconfig.get_path("stdlib"))
    texts = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata is written when Python is built and full of that machine's paths.
        if _SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        if is_heldout(relative.as_posix()) == (split == "heldout"):
            content = path.read_bytes()
            if content.isascii():
                texts[relative.as_posix()] = content.decode("ascii").replace("\r\n", "\n")
    return MappingProxyType(texts)  # Cached, so not to be changed.


class Excerpts:
    """Draws pieces of code of a given length, each starting at the start of a line."""

    def __init__(self, documents: Sequence[str], longest: int) -> None:
        """Pieces of up to ``longest`` characters; shorter documents are left out."""
        self.longest = longest
        self.documents = [text for text in documents if len(text) >= longest]
        if not self.documents:
            raise ValueError(f"no document has {longest} characters")
        self._cumulative_length = list(accumulate(len(text) for text in self.documents))

    def draw(self, rng: random.Random, length: int) -> str:
        """A piece of exactly ``length`` characters; every place in the documents is about as likely."""
        if length > self.longest:
            raise ValueError(f"length must be at most {self.longest}, got {length}")
        (text,) = rng.choices(self.documents, cum_weights=self._cumulative_length)
        start = text.rfind("\n", 0, rng.randint(0, len(text) - length)) + 1
        return text[start : start + length]


HEADER = "# Notes with codes are hidden in the source below. Remember them: the question comes at the end.\n"


def fact_line(key: str, value: str) -> str:
    """The comment line that hides a fact."""
    return f"# note: the code of {key} is {value}\n"


def question_text(key: str) -> str:
    """Asks for the value of a fact; the value follows directly."""
    question = f"one of the notes in the source above tells the code of {key}; what is it?"
    return f"\n\n# question: {question}\n# answer: the code of {key} is "


def draw_facts(rng: random.Random, count: int) -> dict[str, str]:
    """``count`` facts: keys of four letters, all different, and values of four digits."""
    facts: dict[str, str] = {}
    while len(facts) < count:
        facts["".join(rng.choices(string.ascii_lowercase, k=4))] = "".join(rng.choices(string.digits, k=4))
    return facts


def hide(rng: random.Random, code: str, lines: Sequence[str], start: int, stop: int) -> str | None:
    """``code`` with ``lines`` inserted, in this order, at line starts drawn from ``code[start:stop]``.

    None if there is no line start.
    """
    places = [place for place in range(max(start, 1), min(stop, len(code)) + 1) if code[place - 1] == "\n"]
    if not places:
        return None
    pieces, done = [], 0
    for place, line in zip(sorted(rng.choices(places, k=len(lines))), lines, strict=True):
        pieces += [code[done:place], line]
        done = place
    return "".join(pieces) + code[done:]


def retrieval(
    count: int,
    *,
    length: int = 1024,
    facts: int = 4,
    distance: int = 384,
    head: int = 32,
    split: str = "heldout",
    seed: int = 0,
) -> list[Example]:
    """Code with facts hidden in it, then a question about one of them.

    Args:
        count: examples.
        length: bytes of each prompt.
        facts: how many are hidden; one is asked for, the others distract.
        distance: at least so many bytes of code lie between the last fact and the question; take it larger than the
            window of the sparse pattern.
        head: the first so many bytes of code hold no fact.
        split, seed: see :func:`corpus`; the seed of the draws.

    Raises:
        ValueError: ``length`` has no room for all that, or no source is as long.
    """
    rng = random.Random(f"retrieval {split} {seed}")
    code_length = length - len(HEADER) - len(question_text("....")) - facts * len(fact_line("....", "...."))
    if facts < 1 or code_length <= head + distance:
        raise ValueError(f"no room in length {length} for facts {facts}, head {head} and distance {distance}")
    excerpts = Excerpts(tuple(corpus(split).values()), code_length)
    examples: list[Example] = []
    while len(examples) < count:
        hidden = draw_facts(rng, facts)
        lines = [fact_line(key, value) for key, value in hidden.items()]
        source = hide(rng, excerpts.draw(rng, code_length), lines, head, code_length - distance)
        if source is None:  # One line from head to distance: take another excerpt.
            continue
        key = rng.choice(list(hidden))
        examples.append(Example(HEADER + source, question_text(key), hidden[key], RETRIEVAL))
    return examples


def continuation(
    count: int, *, length: int = 1024, answer_length: int = 128, split: str = "heldout", seed: int = 0
) -> list[Example]:
    """Code, and the code that comes next.

    Args:
        count: examples.
        length: bytes of each prompt.
        answer_length: bytes to be continued.
        split, seed: see :func:`corpus`; the seed of the draws.

    Raises:
        ValueError: no source is as long.
    """
    rng = random.Random(f"continuation {split} {seed}")
    excerpts = Excerpts(tuple(corpus(split).values()), length + answer_length)
    pieces = [excerpts.draw(rng, length + answer_length) for _ in range(count)]
    return [Example(piece[:length], "", piece[length:], CONTINUATION, "likelihood") for piece in pieces]
