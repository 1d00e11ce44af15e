"""Files in the form of LongBench (arXiv 2308.14508): JSON lines with ``input``, ``context``, ``answers``, ``length``,
``dataset``, ``language`` and ``all_classes``, from a folder or an archive that the user has.

Each dataset has its metric and its number of new tokens, as published. The instructions are our own, and Chinese is
compared by character (``metrics.py``), where the published code cuts it into words: compare figures of one model's
modes, not with other tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..examples import Example, json_lines
from .chat import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("input", "context", "answers", "dataset")


@dataclass(frozen=True)
class Dataset:
    """How the examples of one dataset are asked and scored."""

    metric: str
    max_new_tokens: int
    instruction: str
    """Before the context."""
    label: str
    """Before the input, where there is one."""
    opening: str = ""
    """How the answer begins."""
    chat: bool = True
    """Examples that are shown and go on (few-shot learning, code) have no chat template around them."""
    stop: str = ""


_QUESTION = "Answer the question from the text, as briefly as you can: with a name, a phrase or a number.", "Question: "
_ZH_QUESTION = "请根据文章回答问题,答案尽量简短。", "问题:"


def _shots(metric: str, max_new_tokens: int, instruction: str) -> Dataset:
    """Examples are shown, the last one is to be gone on with, to the end of its line."""
    return Dataset(metric, max_new_tokens, instruction, "", chat=False, stop="\n")


DATASETS = {
    "narrativeqa": Dataset("f1", 128, *_QUESTION, "Answer:"),
    "qasper": Dataset(
        "f1",
        128,
        'Answer the question from the article, as briefly as you can; "unanswerable" where it does not say, "yes" or '
        '"no" where it is asked so.',
        "Question: ",
        "Answer:",
    ),
    "multifieldqa_en": Dataset("f1", 64, *_QUESTION, "Answer:"),
    "multifieldqa_zh": Dataset("f1", 64, *_ZH_QUESTION, "回答:"),
    "hotpotqa": Dataset("f1", 32, *_QUESTION, "Answer:"),
    "2wikimqa": Dataset("f1", 32, *_QUESTION, "Answer:"),
    "musique": Dataset("f1", 32, *_QUESTION, "Answer:"),
    "dureader": Dataset("rouge_l", 128, *_ZH_QUESTION, "回答:"),
    "gov_report": Dataset("rouge_l", 512, "Summarize this report in one page.", "", "Summary:"),
    "qmsum": Dataset("rouge_l", 512, "Answer the query about this meeting in a few sentences.", "Query: ", "Answer:"),
    "multi_news": Dataset("rouge_l", 512, "Summarize what these news articles say in one page.", "", "Summary:"),
    "vcsum": Dataset("rouge_l", 512, "请总结这次会议的内容。", "", "会议总结:"),
    "trec": _shots("classification", 64, "What is asked for in each question? Some examples:"),
    "triviaqa": _shots("f1", 32, "Answer each question from its passage. Some examples:"),
    "samsum": _shots("rouge_l", 128, "Summarize each dialogue in a few sentences. Some examples:"),
    "lsht": _shots("classification", 64, "请判断新闻的类别,下面是一些例子。"),
    "passage_count": Dataset(
        "number",
        32,
        "Some of these numbered paragraphs are copies of others. How many different ones are there? Answer with a "
        "number.",
        "",
        "Number of different paragraphs:",
    ),
    "passage_retrieval_en": Dataset(
        "number",
        32,
        "Which of these numbered paragraphs is the summary below of? Answer in the form: Paragraph 1.",
        "Summary: ",
        "The summary is of",
    ),
    "passage_retrieval_zh": Dataset(
        "number", 32, '下面的摘要属于哪一个段落?请按"段落1"的格式回答。', "摘要:", "答案是"
    ),
    "lcc": Dataset("edit_similarity", 64, "Complete the code with its next line.", "", chat=False),
    "repobench-p": Dataset("edit_similarity", 64, "Complete the code with its next line.", "", chat=False),
}
"""By the name of the dataset; the versions of LongBench-E (``qasper_e``) are the same."""


def is_longbench(path: str | Path) -> bool:
    """Whether the first line of a file is a row of LongBench's form."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            row = json.loads(next((line for line in file if line.strip()), ""))
        except ValueError:
            return False
    return isinstance(row, Mapping) and all(c in row for c in COLUMNS) and "question" not in row


def load_longbench(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    chat: bool = True,
) -> list[Example]:
    """Reads a file; the task of an example is its dataset.

    Args:
        path: ``.jsonl``.
        tokenizer: the model's, for its chat template and for ``max_length``.
        max_length: tokens of a prompt and of what is generated, at most; longer contexts lose their middle.
        chat: use the tokenizer's chat template, where it has one, for all datasets but those that show examples.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks a rule, names an unknown dataset or does not fit into ``max_length``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    form = ChatFormat.of(tokenizer) if chat else ChatFormat()
    examples = []
    for where, row in json_lines(path):
        try:
            examples.append(_example(row, tokenizer, max_length, form))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not examples:
        raise ValueError(f"{path}: the file has no examples")
    return examples


def _example(row: object, tokenizer: PreTrainedTokenizerBase, max_length: int | None, form: ChatFormat) -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"a line must be an object with {', '.join(COLUMNS)}, got {type(row).__name__}")
    for column in COLUMNS:
        if column not in row:
            raise ValueError(f"the column {column!r} is missing")
    for column in ("input", "context", "dataset"):
        if not isinstance(row[column], str):
            raise ValueError(f"the column {column!r} must be text, got {type(row[column]).__name__}")
    answers, classes = _texts(row, "answers"), _texts(row, "all_classes")
    if not answers:
        raise ValueError("the column 'answers' is empty")
    name = row["dataset"].removesuffix("_e")
    if name not in DATASETS:
        raise ValueError(f"the column 'dataset' must be one of {', '.join(DATASETS)}, got {row['dataset']!r}")
    dataset = DATASETS[name]
    if dataset.metric == "classification" and not classes:
        raise ValueError("the column 'all_classes' must name the classes")
    if dataset.chat:
        before, after = form.before, form.after
        asked = f"\n\n{dataset.label}{row['input']}" if row["input"] else ""
        question = asked + after + dataset.opening
        answer = f" {answers[0]}" if dataset.opening else answers[0]
    else:  # the input is the last of the examples, or more code, and goes on
        before, question, answer = "", ("\n\n" if dataset.stop else "") + row["input"], answers[0]
    opening = f"{before}{dataset.instruction}\n\n"
    context = row["context"]
    if max_length is not None:
        context = _shortened(opening, context, question, max_length - dataset.max_new_tokens, tokenizer)
    return Example(
        opening + context,
        question,
        answer,
        row["dataset"],
        dataset.metric,
        answers,
        classes,
        dataset.max_new_tokens,
        dataset.stop,
    )


def _texts(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    texts = row.get(column)
    if texts is None:
        return ()
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"the column {column!r} must be a list of texts, got {texts!r}")
    return tuple(t for t in texts if t)


def _shortened(opening: str, context: str, question: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The context without as much of its middle as is too much."""
    tokens = tokenizer(context, add_special_tokens=False)["input_ids"]
    room = len(tokens)
    while (size := len(tokenizer(opening + context + question)["input_ids"])) > limit:
        room -= size - limit
        if room < 2:
            raise ValueError(f"max_length leaves {limit} tokens for the prompt, and the question takes them all")
        kept = tokens[: room // 2], tokens[len(tokens) - (room - room // 2) :]
        context = "".join(str(tokenizer.decode(part)) for part in kept)
    return context
