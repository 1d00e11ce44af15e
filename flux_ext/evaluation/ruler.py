"""Tasks in the forms of RULER (arXiv 2404.06654), made of real text, at a length in tokens.

================ ============================================================ ======================================
task             what the prompt holds                                        what is expected
================ ============================================================ ======================================
``single``       prose, one note with a code hidden in it                     the code
``multikey``     several notes, each of another thing                         the code of one of them
``multivalue``   several notes of one thing                                   all its codes
``multiquery``   several notes, each of another thing                         the codes of all of them
``tracking``     variables: one is set to a number, each other one to the one all their names
                 before; another such chain beside it
``commonwords``  a numbered list of words, ten of them ten times as often     the ten
``prose``        prose                                                        what comes next (likelihood)
``code``         source code                                                  what comes next (likelihood)
``frequentwords`` invented words, the k-th as often as 1 / k^2                the three most frequent
``twohop``       notes that name a thing's keeper, notes with a keeper's code the code of one thing's keeper
================ ============================================================ ======================================

The last two are not for training: they show what routers do with a kind of task that they have not seen.

All prompts have one form: a message in the tokenizer's chat template, where it has one, with the question before or
after the text, as a coin falls; then the beginning of the answer's sentence, so that a model without much training in
chat knows what to write. The same arguments give the same examples: the i-th depends on task, split, seed and i, not
on how many are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from ..examples import Example
from . import texts
from .chat import ChatFormat
from .haystack import Haystack, hide
from .tasks import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADJECTIVES = (
    "ancient bitter brave calm clever distant eager early faint fierce gentle golden hollow humble idle jolly lively "
    "lonely lucky modest narrow nimble patient polite proud quiet rapid restless silent silver simple steady stormy "
    "tender vivid wandering"
)
_NOUNS = (
    "anchor badger beacon bridge candle canyon castle cedar comet copper dolphin falcon forest garden glacier harbor "
    "hazel island jasmine kettle ladder lantern maple meadow mirror orchard otter pebble pepper pillow quartz raven "
    "ribbon saddle sparrow teapot thistle trumpet tulip turtle valley violin walnut willow window"
)
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True)
class Draft:
    """A task's text, of any length, and its question."""

    body: Callable[[int], str]
    """The text, longer the larger the number is."""
    question: str
    opening: str
    """How the answer's sentence begins."""
    answer: str
    answers: tuple[str, ...] = ()
    """None: the text is continued, and its likelihood measured."""
    most: int | None = None
    """``body`` takes no larger number; None: its text goes on for ever."""


@dataclass(frozen=True)
class Material:
    """What tasks are made of; texts are read when a task first needs them."""

    read_prose: Callable[[], Sequence[str]]
    read_code: Callable[[], Sequence[str]]
    count_tokens: Callable[[str], int]
    notes: int
    answer_tokens: int

    @cached_property
    def prose(self) -> Haystack:
        """In words."""
        return Haystack(self.read_prose(), "word")

    @cached_property
    def code(self) -> Haystack:
        """In lines."""
        return Haystack(self.read_code(), "line")


# What the tasks need


def _draw_things(rng: random.Random, count: int) -> list[str]:
    """Names of things, all different."""
    return rng.sample([f"{a} {n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()], count)


def _draw_codes(rng: random.Random, count: int) -> list[str]:
    """Numbers of seven digits, all different."""
    return [str(n) for n in rng.sample(range(1_000_000, 10_000_000), count)]


def _draw_invented(rng: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Invented words, all different and of one length, so that none is part of another."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(_SYLLABLES, k=syllables))] = None
    return list(found)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _in_prose(
    rng: random.Random, material: Material, notes: Sequence[str], secret: Sequence[str], ordered: bool = False
) -> Callable[[int], str]:
    """Prose with notes hidden anywhere in it. ``secret``: words that the prose itself must not hold."""
    hay = material.prose
    depths = [rng.random() for _ in notes]
    placed = list(zip(sorted(depths) if ordered else depths, notes, strict=True))
    if any(word in hay.text for word in secret):  # invented words and long numbers: next to never
        raise ValueError(f"the text itself holds one of {', '.join(secret)}: take another seed")
    first = rng.choice(hay.starts)
    return lambda n: hide(hay.take(first, n), placed)


# The tasks


def _single(rng: random.Random, material: Material, notes: int = 1) -> Draft:
    things, codes = _draw_things(rng, notes), _draw_codes(rng, notes)
    lines = [f"Note: the code of the {t} is {c}." for t, c in zip(things, codes, strict=True)]
    return Draft(
        _in_prose(rng, material, lines, codes),
        f"A note in the text tells the code of the {things[0]}. What is it?",
        f"The code of the {things[0]} is",
        f" {codes[0]}",
        (codes[0],),
    )


def _multikey(rng: random.Random, material: Material) -> Draft:
    return _single(rng, material, material.notes)


def _multivalue(rng: random.Random, material: Material) -> Draft:
    (thing,), codes = _draw_things(rng, 1), _draw_codes(rng, material.notes)
    lines = [f"Note: one of the codes of the {thing} is {c}." for c in codes]
    return Draft(
        _in_prose(rng, material, lines, codes, ordered=True),
        f"Notes in the text tell {len(codes)} codes of the {thing}. What are they?",
        f"The codes of the {thing} are",
        f" {', '.join(codes)}",
        tuple(codes),
    )


def _multiquery(rng: random.Random, material: Material) -> Draft:
    things, codes = _draw_things(rng, material.notes), _draw_codes(rng, material.notes)
    lines = [f"Note: the code of the {t} is {c}." for t, c in zip(things, codes, strict=True)]
    asked = _listed([f"the {t}" for t in things])
    return Draft(
        _in_prose(rng, material, lines, codes),
        f"Notes in the text tell the codes of {asked}. What are they?",
        f"The codes of {asked} are, in this order:",
        f" {', '.join(codes)}",
        tuple(codes),
    )


def _tracking(rng: random.Random, material: Material) -> Draft:
    hops = material.notes
    names = [word.upper() for word in _draw_invented(rng, 2 * (hops + 1))]
    right, other = names[: hops + 1], names[hops + 1 :]
    values = _draw_codes(rng, 2)
    chains = []
    for chain, value in zip((right, other), values, strict=True):
        lines = [
            f"Set {name} = {before}." for name, before in zip(chain, [value, *chain], strict=False)
        ]  # each after the one it refers to
        chains.append(list(zip(sorted(rng.random() for _ in lines), lines, strict=True)))
    lines = [line for _, line in sorted(chains[0] + chains[1])]
    return Draft(
        _in_prose(rng, material, lines, [*names, *values], ordered=True),
        "The text sets variables, to a number or to the value of another variable. Which variables have the value "
        f"{values[0]} in the end?",
        f"The variables with the value {values[0]} are:",
        f" {', '.join(right)}",
        tuple(right),
    )


_COMMON, _TIMES_MORE = 10, 10


def _commonwords(rng: random.Random, material: Material, length: int) -> Draft:
    # At about 6 tokens an entry the common words, 30 times each, are to take at most a third of the list, the others,
    # 3 times each, the rest: less often in short lists, more often where the text has too few words for a long one.
    most = max(1, length // (3 * 6 * _COMMON * _TIMES_MORE))
    words = list(material.prose.vocabulary)
    rng.shuffle(words)
    common: list[str] = []
    for word in words:
        if len(common) < _COMMON and not any(word in other or other in word for other in common):
            common.append(word)
    others = [w for w in words if not any(c in w for c in common)]
    times = min(3, most)
    while times < most and len(others) * times < length // 4:
        times += 1
    if len(common) < _COMMON or len(others) * times < length // 12:
        raise ValueError(f"the text has too few words for the task commonwords at length {length}: {len(words)}")
    salt = rng.random()

    def body(n: int) -> str:
        entries = common * (times * _TIMES_MORE) + [others[i // times] for i in range(n)]
        random.Random(salt).shuffle(entries)
        return "\n".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    return Draft(
        body,
        f"Some words of this numbered list are in it far more often than all others. Which {_COMMON} words are it?",
        f"The {_COMMON} words are:",
        f" {', '.join(sorted(common))}",
        tuple(sorted(common)),
        most=len(others) * times,
    )


_ASKED, _RANKS = 3, 40


def _frequentwords(rng: random.Random, material: Material) -> Draft:
    words = _draw_invented(rng, _RANKS)
    total = sum(1 / rank**2 for rank in range(1, _RANKS + 1))
    edges = [x / total for x in accumulate(1 / rank**2 for rank in range(1, _RANKS + 1))]
    salt = rng.random()

    def body(n: int) -> str:
        size = n + 60  # of 60 words, 37 are of the first rank, then 10, 4, 2
        ends = [round(size * edge) for edge in edges]
        entries = [w for w, a, b in zip(words, [0, *ends], ends, strict=False) for _ in range(b - a)]
        random.Random(salt).shuffle(entries)
        return " ".join(entries)

    return Draft(
        body,
        f"Which {_ASKED} words are the most frequent in this text of invented words?",
        f"The {_ASKED} most frequent words are:",
        f" {', '.join(words[:_ASKED])}",
        tuple(words[:_ASKED]),
    )


def _twohop(rng: random.Random, material: Material) -> Draft:
    count = material.notes
    things, codes = _draw_things(rng, count), _draw_codes(rng, count)
    keepers = [w.capitalize() for w in _draw_invented(rng, count)]
    lines = [f"Note: the keeper of the {t} is {k}." for t, k in zip(things, keepers, strict=True)]
    lines += [f"Note: the code of {k} is {c}." for k, c in zip(keepers, codes, strict=True)]
    return Draft(
        _in_prose(rng, material, lines, [*keepers, *codes]),
        f"Notes in the text tell who keeps the {things[0]}, and which code each keeper has. What is the code of the "
        f"keeper of the {things[0]}?",
        f"The code of the keeper of the {things[0]} is",
        f" {codes[0]}",
        (codes[0],),
    )


def _continuation(rng: random.Random, material: Material, hay: Haystack, what: str) -> Draft:
    """A stretch of text whose end is fixed, and which begins the earlier the longer it is."""
    units, answer = hay.units, ""
    for _ in range(1000):
        end = last = rng.randrange(len(units))
        bound = next(b for b in accumulate(map(len, hay.documents)) if end < b)  # the answer stays in its document
        answer = ""
        while last < bound and material.count_tokens(answer.rstrip()) < material.answer_tokens:
            answer, last = answer + units[last], last + 1
        answer = answer.rstrip()
        if units[end].strip() and material.count_tokens(answer) >= material.answer_tokens:
            break
    else:
        raise ValueError(f"no document has {material.answer_tokens} tokens to continue")
    return Draft(
        lambda n: "".join(hay.take(end - n, n)),
        f"Continue this {what} where it ends: write what comes next.",
        "",
        answer,
        most=len(units) - (last - end),
    )


def _prose(rng: random.Random, material: Material) -> Draft:
    return _continuation(rng, material, material.prose, "text")


def _code(rng: random.Random, material: Material) -> Draft:
    return _continuation(rng, material, material.code, "source code")


TRAINING_TASKS = ("single", "multikey", "multivalue", "multiquery", "tracking", "commonwords", "prose", "code")
HELDOUT_TASKS = ("frequentwords", "twohop")
TASKS = (*TRAINING_TASKS, *HELDOUT_TASKS)

_DRAFTS: dict[str, Callable[[random.Random, Material], Draft]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "prose": _prose,
    "code": _code,
    "frequentwords": _frequentwords,
    "twohop": _twohop,
}


# Examples


def make_examples(
    tasks: Sequence[str],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    min_length: int | None = None,
    prose: Sequence[str] | None = None,
    code: Sequence[str] | None = None,
    split: str = "heldout",
    seed: int = 0,
    notes: int = 4,
    answer_tokens: int = 64,
    chat: bool = True,
    opening: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> list[Example]:
    """Examples of tasks, ``count`` of each, the tasks in turn.

    Args:
        tasks: names out of ``TASKS``.
        count: examples of each task.
        tokenizer: the Hugging Face tokenizer of the model, for which lengths count.
        length: tokens of a prompt and of what is generated after it, at most; less by no more than the next unit of
            text would need, a word of prose, a line of code, an entry of a list.
        min_length: the length of each example is drawn from ``[min_length, length]``; None: all are ``length`` long.
        prose, code: documents; both splits are made from the same ones. None: what is installed, see ``texts.py``.
        split: ``"train"`` or ``"heldout"``: no passage is in both.
        seed: of the draws.
        notes: hidden in ``multikey``, ``multivalue`` and ``multiquery``; steps of ``tracking``, things in ``twohop``.
        answer_tokens: to be continued in ``prose`` and ``code``; a little more, up to the end of a word or line.
        chat: use the tokenizer's chat template, where it has one.
        opening: the prompt ends with the beginning of the answer's sentence; else the whole sentence is the answer, and
            prompts of all tasks end alike.
        progress: called after each example.

    Notes are hidden in prose that begins anew where it ends; what is to be continued has every passage once.

    Raises:
        ValueError: an unknown task or split, a number that is too small, a length without room for the task, or too
            little text.
    """
    if not tasks:
        raise ValueError("tasks must not be empty")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {unknown[0]!r}")
    for name, value, least in (("count", count, 1), ("notes", notes, 1), ("answer_tokens", answer_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    shortest = length if min_length is None else min_length
    if not 1 <= shortest <= length:
        raise ValueError(f"min_length must be in [1, length], got {min_length} with length {length}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    material = Material(
        lambda: texts.prose(split) if prose is None else texts.split_texts(prose, split),
        lambda: texts.code(split) if code is None else texts.split_texts(code, split),
        count_tokens,
        notes,
        answer_tokens,
    )
    form = ChatFormat.of(tokenizer) if chat else ChatFormat()
    examples = []
    for i in range(count):
        for task in tasks:
            rng = random.Random(f"{task} {split} {seed} {i}")
            size = rng.randint(shortest, length)
            draft = _commonwords(rng, material, size) if task == "commonwords" else _DRAFTS[task](rng, material)
            if not opening:
                draft = replace(draft, opening="", answer=draft.opening + draft.answer)
            examples.append(_example(task, draft, form, tokenizer, size, question_first=rng.random() < 0.5))
            progress()
    return examples


def _example(
    task: str, draft: Draft, form: ChatFormat, tokenizer: PreTrainedTokenizerBase, length: int, question_first: bool
) -> Example:
    def texts_of(n: int) -> tuple[str, str]:
        body = draft.body(n).strip()
        if question_first:
            return f"{form.before}{draft.question}\n\n{body}", form.after + draft.opening
        return form.before + body, f"\n\n{draft.question}{form.after}{draft.opening}"

    def prompt_tokens(n: int) -> int:
        return len(tokenizer("".join(texts_of(n)))["input_ids"])

    answer_tokens = len(tokenizer(draft.answer, add_special_tokens=False)["input_ids"])
    # Room for answers in another form: other separators, a few words before.
    new_tokens = answer_tokens + max(4, answer_tokens // 2) if draft.answers else answer_tokens
    try:
        n = largest_that_fits(prompt_tokens, length - new_tokens, draft.most)
    except ValueError as error:
        raise ValueError(f"length {length} has no room for the task {task}: {error}") from None
    if n == draft.most:  # shorter than asked for, and another prompt would be the same text again
        raise ValueError(
            f"the text is too short for the task {task} at length {length}: all of it takes {prompt_tokens(n)} tokens"
        )
    context, question = texts_of(n)
    if draft.answers:
        return Example(context, question, draft.answer, task, "found", draft.answers, max_new_tokens=new_tokens)
    return Example(context, question, draft.answer, task, "likelihood")


def largest_that_fits(size: Callable[[int], int], limit: int, most: int | None) -> int:
    """The largest ``n`` in ``[0, most]`` with ``size(n) <= limit``, where sizes grow about evenly with ``n``; one that
    fills the limit is taken at once.

    Raises:
        ValueError: ``size(0)`` is too large already.
    """
    low, at_low = 0, size(0)
    if at_low > limit:
        raise ValueError(f"it needs {at_low} tokens beside the answer's, and {limit} are left")
    start = at_low
    high = at_high = None
    guess = max(1, (limit - at_low) // 2)
    for step in range(200):
        if most is not None:
            guess = min(guess, most)
        if guess <= low:
            return low
        at = size(guess)
        if at == limit:
            return guess
        if at < limit:
            low, at_low = guess, at
        else:
            high, at_high = guess, at
        if high is None or at_high is None:
            guess = low + max(1, 1 + int((limit - at_low) * low / max(1, at_low - start)))
            if step > 4:  # sizes grow ever more slowly
                guess = max(guess, 2 * low)
        elif high - low <= 1:
            return low
        elif step < 10:
            share = (limit - at_low) / (at_high - at_low)
            guess = min(high - 1, max(low + 1, low + int(share * (high - low))))
        else:
            guess = (low + high) // 2
    return low
