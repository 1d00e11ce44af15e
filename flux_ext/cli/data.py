"""Examples to train on and to be scored on: ``flux-ext make-data`` makes them, ``flux-ext eval`` reads them."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tqdm import tqdm

from ..evaluation import ruler, texts
from ..evaluation.longbench import is_longbench, load_longbench
from ..examples import Example, load_examples, save_examples


def make(args: argparse.Namespace) -> None:
    """Makes the examples that the options ask for and writes them.

    Raises:
        ValueError: the tokenizer cannot be loaded, or a rule of :func:`~flux_ext.evaluation.ruler.make_examples` is
            broken.
        FileNotFoundError: a text is missing.
    """
    tasks = args.tasks or (ruler.TRAINING_TASKS if args.split == "train" else ruler.TASKS)
    prose = texts.read_texts(args.prose) if args.prose else None
    code = texts.read_texts(args.code) if args.code else None
    tokenizer = tokenizer_of(args.model)
    with tqdm(total=args.count * len(tasks), unit="example", desc="making examples") as bar:
        examples = ruler.make_examples(
            tasks,
            args.count,
            tokenizer,
            length=args.length,
            min_length=args.min_length,
            prose=prose,
            code=code,
            split=args.split,
            seed=args.seed,
            notes=args.notes,
            chat=not args.no_chat,
            opening=not args.no_opening,
            progress=bar.update,
        )
    save_examples(examples, args.output)
    counts = Counter(e.task for e in examples)
    print(f"{args.output}: {', '.join(f'{count} {task}' for task, count in counts.items())}")


def read(args: argparse.Namespace) -> list[Example]:
    """The examples of all files, of each task the first so many.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`~flux_ext.examples.load_examples`.
    """
    examples: list[Example] = []
    for path in args.data:
        if is_longbench(path):
            examples += load_longbench(
                path, tokenizer_of(args.model), max_length=args.max_length, chat=not args.no_chat
            )
        else:
            examples += load_examples(path)
    if args.examples is None:
        return examples
    seen: Counter[str] = Counter()
    kept = []
    for example in examples:
        seen[example.task] += 1
        if seen[example.task] <= args.examples:
            kept.append(example)
    return kept


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a folder or hub name.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of any type: the readers of tokenizers have their own
        raise ValueError(f"--model {model} has no tokenizer that can be loaded: {error}") from error
