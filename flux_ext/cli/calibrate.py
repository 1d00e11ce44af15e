"""``flux-ext calibrate``: routers that were trained, made as sparse as a budget allows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..examples import Example, load_examples


def run(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: an option breaks a rule, the data do not fit the budget, or the output folder is of something else.
    """
    from ..models.patching import get_routers
    from ..routers.card import training_of
    from ..routers.files import refuse_foreign
    from ..training import Recipe, RouterDataset
    from ..training.calibration import calibrate
    from ..training.data import PackedCollator, PaddedCollator
    from .commands import budgets, load_model

    recipe = Recipe(**budgets(args.budget))
    examples = [e for path in args.data for e in load_examples(path)]
    recipe.check_tasks(sorted({e.task for e in examples}))
    refuse_foreign(args.output)
    training = training_of(args.routers)
    model, tokenizer = load_model(args, args.routers)
    found = calibrate(
        model,
        RouterDataset(examples, tokenizer, max_length=args.max_length),
        recipe,
        collator=PackedCollator() if args.packed else PaddedCollator(tokenizer.pad_token_id or 0),
        batch_size=args.batch_size,
        margin=args.margin,
        tries=args.tries,
    )
    print(found)
    record = "\n\n".join(filter(None, [training, found.record()]))
    get_routers(model).save_pretrained(args.output, model_card_kwargs={"training": record})
    print(f"routers written to {args.output}")


TOO_FEW = "calibrated on the examples that were trained on: no task has eight, of which one could be kept"


def check_data(args: argparse.Namespace, budget: bool) -> None:
    """Of ``--calibration-data``, before anything is loaded.

    Raises:
        ValueError: there are examples to calibrate on, but no ``budget`` to calibrate to.
    """
    if args.calibration_data is not None and (args.no_calibrate or not budget):
        why = "--no-calibrate" if args.no_calibrate else "targets, which nothing is calibrated to"
        raise ValueError(f"--calibration-data must be left out with {why}")


def held_out(
    args: argparse.Namespace, examples: Sequence[Example], budget: bool, count: int | None = None
) -> tuple[list[Example], list[Example]]:
    """The examples that are trained on, and those that are calibrated on: ``--calibration-data``, or ``count`` of the
    ``examples`` (default: as :func:`~flux_ext.training.data.hold_out`); none where nothing is calibrated.

    Raises:
        ValueError: as :func:`check_data`.
    """
    from ..training.data import HELD_OUT, hold_out

    check_data(args, budget)
    if args.no_calibrate or not budget:
        return list(examples), []
    if args.calibration_data is not None:
        return list(examples), load_examples(args.calibration_data)
    return hold_out(examples, HELD_OUT if count is None else count)
