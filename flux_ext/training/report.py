"""What a training says at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .monitor import SUMS
from .objective import Multipliers

if TYPE_CHECKING:
    from .trainer import FluxTrainer


def training_report(trainer: FluxTrainer) -> str:
    """Sparsity and losses of each task over the latest sequences, as a table; and whether routed is dense so far."""
    rows = [["task", "sequences", "sparsity", "target", "extra loss", "dense loss", "training loss"]]
    multipliers = trainer.objective.multipliers
    columns = trainer.monitor.recent.sums().unbind(1)
    for i, (task, column) in enumerate(zip(trainer.tasks, columns, strict=True)):
        sums = dict(zip(SUMS, column.tolist(), strict=True))
        count, deployed = sums["count"], sums["deployed"]
        target = float(multipliers.target[i]) if isinstance(multipliers, Multipliers) else None
        rows.append(
            [
                task,
                f"{count:.0f}",
                _ratio(sums["own_sparsity"], count, ".2f"),
                "-" if target is None else f"{target:.2f}",
                _ratio(sums["extra"], deployed, "+.4f"),
                _ratio(sums["dense"], deployed, ".4f"),
                _ratio(sums["lm_loss"], count, ".4f"),
            ]
        )
    kept = [c for c in zip(*rows, strict=True) if any(text != "-" for text in c[1:])]  # a budget has no targets
    widths = [max(map(len, column)) for column in kept]
    lines = [
        "  ".join(x.rjust(w) if j else x.ljust(w) for j, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in zip(*kept, strict=True)
    ]
    head = (
        f"the latest {trainer.monitor.recent.count} sequences, losses in nats per answer token; sparsity and extra "
        "loss are of the routers' own routes, the training loss is of those that training took, some of which explore"
    )
    return "\n".join([head, *lines, *([remark] if (remark := dense_remark(trainer)) else [])])


def training_record(trainer: FluxTrainer) -> str | None:
    """How the routers were trained so far, for their model card; None before the first step."""
    recipe, args = trainer.recipe, trainer.args
    if not trainer.state.global_step:
        return None
    if recipe.has_budget:
        unit = "of the dense loss" if recipe.budget_unit == "share" else "nats per answer token"
        own = [f"{budget:g} for {task}" for task, budget in sorted(recipe.budgets.items())]
        goal = f"budget {', '.join([f'{recipe.quality_budget:g}', *own])} {unit}"
    else:
        goal = f"target sparsity {', '.join(f'{recipe.target(task):g} for {task}' for task in trainer.tasks)}"
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    text = (
        f"{trainer.state.global_step} of {trainer.state.max_steps} steps of {sequences} sequences; "
        f"objective {recipe.objective}; {goal}; learning rate {args.learning_rate:g}; seed {args.seed}."
    )
    if trainer.calibration is not None:
        text = f"{text} {trainer.calibration.record()}"
    return f"{text}\n\n```\n{training_report(trainer)}\n```" if trainer.monitor.recent.count else text


def dense_remark(trainer: FluxTrainer) -> str | None:
    """Why routed equals dense, where it does of late; else None."""
    watch, sums = trainer.monitor.routes, dict(zip(SUMS, trainer.monitor.recent.sums().sum(1).tolist(), strict=True))
    if not watch.count or watch.sparsity > 0:
        return None
    equal, everywhere = "dense", "full attention everywhere"
    if trainer.routers.config.full != "full":
        equal, everywhere = "the full mode", "the full mode everywhere"
    return (
        f"routed equals {equal} so far: for all of the latest {watch.count} sequences the routers' own choice was "
        f"{everywhere}. Training took sparse {sums['sparsity'] / sums['count']:.0%} of the time because its "
        "sampling explores; in use argmax decides, and no router holds sparse for the likelier yet. Train for more "
        "steps, or with a larger budget or target"
    )


def _ratio(part: float, whole: float, form: str) -> str:
    return format(part / whole, form) if whole else "-"
