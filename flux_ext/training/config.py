"""The options of the routers' training; all others are the Hugging Face ``TrainingArguments``."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

FlipChoice = Literal["evenly", "by_worth"]
ObjectiveName = Literal["counterfactual", "soft", "straight_through", "even_odds"]
MultiplierForm = Literal["inequality", "published", "published_abs"]
ScheduleName = Literal["cosine", "linear", "exponential"]
BudgetUnit = Literal["share", "nats"]

OBJECTIVES = ("counterfactual", "soft", "straight_through", "even_odds")
MULTIPLIER_FORMS = ("inequality", "published", "published_abs")
SCHEDULES = ("cosine", "linear", "exponential")
FLIP_CHOICES = ("evenly", "by_worth")
BUDGET_UNITS = ("share", "nats")

DEFAULT_BUDGET = 0.01
DEFAULT_TARGET = 0.5
DEFAULT_WHITEN = 48

_OF_FLIPS = ("flips", "flip_choice", "heads_per_flip", "logit_bound", "delta_clip")

_PUBLISHED: dict[str, Any] = {
    "targets": {"retrieval": 0.45},
    "default_target": 1.0,
    "multipliers": "published",
    "multiplier_lr": 1e-3,
    "whiten": 0,
}
PAPER_RECIPES: dict[str, dict[str, Any]] = {
    "flux": {**_PUBLISHED, "objective": "soft"},
    "elastic": {**_PUBLISHED, "objective": "straight_through", "targets": {"retrieval": 0.7}},
}
"""How the papers train: Flux Attention (arXiv 2604.07394, section 4) and Elastic Attention (arXiv 2601.17367). What is
not here is as published by default: the temperature, and the bias that these objectives start with."""

PUBLISHED_LR = 5e-4
PUBLISHED_BATCH = 48
"""Sequences per step, of all processes together."""
PUBLISHED_LENGTH = 64 * 1024
"""Tokens of a sequence."""


@dataclass(frozen=True)
class Recipe:
    """How routers are trained.

    What they strive for is one of two. A **budget** (the default): the sparsest routes that lose no more than so much
    quality, whatever the input; no task labels are needed (:mod:`~flux_ext.training.budget`). Or, where ``targets`` or
    ``default_target`` is given or ``multipliers`` are the published ones, a **target sparsity** for each task.

    Args:
        objective: ``"counterfactual"`` (exact worth of one layer at a time, no backward pass through the
            backbone), ``"soft"`` (Flux Attention, arXiv 2604.07394: Gumbel-weighted mixture),
            ``"straight_through"`` (Elastic Attention, arXiv 2601.17367, and both published codes: hard
            forward, soft gradient) or ``"even_odds"`` (the same with a gradient that does not vanish where log-odds are
            large; at more sparsity with block-sparse attention). None: what kept most on a real model with streaming
            (docs/evaluation.md), straight-through for routers per head, counterfactuals for routers per layer.
        budget: how much more the answers' loss may be than with every route full (the dense loss; of the full mode,
            where ``FluxConfig.full`` is not ``"full"``), in the mean over the data, under the routers' own choices;
            None: 0.01, where there are no targets.
        budget_unit: ``"share"`` of the mean dense loss (0.01 is one percent), or ``"nats"`` per answer token.
        budgets: tasks that have a budget of their own, in the same unit, and so a price of their own. 0: only what
            costs nothing is sparse.
        targets: per task, the share of sparse attention to reach, in [0, 1].
        default_target: the target of tasks that ``targets`` does not name; None: 0.5.
        multipliers: ``"inequality"``: ``lambda1 * (target - sparsity)``, a price that may fall again once
            the target is met. ``"published"``: ``lambda1 * d + lambda2 * d^2`` with ``d = sparsity -
            target``; ``"published_abs"``: with ``|d|``, as in the published code.
        multiplier_lr: step of the targets' multipliers' gradient ascent (published: 1e-3), in nats per unit of
            sparsity.
        tau_start, tau_end, tau_share, tau_schedule: temperature of the Gumbel relaxation; it goes from start
            to end over the first ``tau_share`` of the steps and stays there. Of no effect on ``"even_odds"``.
        start_bias: log-odds of full attention at the start of routers that are still as they were made; trained ones
            keep theirs. None: 4.5 as published for ``"soft"`` and ``"straight_through"``, 2 for the others.
        whiten: prompts of the training data whose pooled states centre and scale the first layers of routers that
            are still as they were made, before the first step (:mod:`~flux_ext.training.start`). 0: none. A few
            dozen let routers tell inputs apart that they otherwise route alike. None: 48, where there are new routers
            and at least two examples.
        flips: counterfactuals per sequence and step; they share one base forward. None: 2, with head-level routing 4
            (its units are more and their worth is smaller), or all layers where there are fewer. This and the options
            below count with counterfactuals alone.
        flip_choice: which layers are flipped: ``"evenly"``, each as often, or ``"by_worth"``, those more often whose
            flips have changed the loss more (:mod:`~flux_ext.training.flips`); the gradient's mean is the same.
        heads_per_flip: with head-level routing, KV heads switched together.
        logit_bound: log-odds beyond which a counterfactual router is pulled back, so that it can still turn.
        delta_clip: largest worth of one flip that counts, in nats.

    Raises:
        ValueError: a value breaks its rule; all numbers are finite.
    """

    objective: ObjectiveName | None = None
    budget: float | None = None
    budget_unit: BudgetUnit = "share"
    budgets: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    default_target: float | None = None
    multipliers: MultiplierForm = "inequality"
    multiplier_lr: float = 0.1
    tau_start: float = 1.5
    tau_end: float = 1.0
    tau_share: float = 0.6
    tau_schedule: ScheduleName = "cosine"
    start_bias: float | None = None
    whiten: int | None = None
    flips: int | None = None
    flip_choice: FlipChoice = "evenly"
    heads_per_flip: int = 1
    logit_bound: float = 2.0
    delta_clip: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", (None, *OBJECTIVES)),
            ("multipliers", MULTIPLIER_FORMS),
            ("tau_schedule", SCHEDULES),
            ("budget_unit", BUDGET_UNITS),
            ("flip_choice", FLIP_CHOICES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if not self.has_budget and (self.budget is not None or self.budgets):
            raise ValueError(
                "budget must be left out where targets, default_target or published multipliers are given: "
                "training keeps to a budget or to targets"
            )
        default = {} if self.default_target is None else {"default_target": self.default_target}
        for task, target in {**default, **self.targets}.items():
            if not 0 <= target <= 1:
                raise ValueError(f"the target sparsity of {task} must lie in [0, 1], got {target}")
        for name, budget in {"": self.quality_budget, **self.budgets}.items():
            of = f" of {name}" if name else ""
            if not 0 <= budget < math.inf:
                raise ValueError(f"the budget{of} must be >= 0 and finite, got {budget}")
            if budget > 1 and self.budget_unit == "share":
                raise ValueError(
                    f"the budget{of} must be at most 1, as it is a share of the dense loss, got {budget}: 0.05 is 5 %, "
                    'and nats per token have budget_unit="nats" (on the command line: 0.05nats)'
                )
        for name in ("tau_start", "tau_end", "logit_bound", "delta_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.tau_share <= 1:
            raise ValueError(f"tau_share must lie in [0, 1], got {self.tau_share}")
        if not 0 <= self.multiplier_lr < math.inf:
            raise ValueError(f"multiplier_lr must be >= 0 and finite, got {self.multiplier_lr}")
        if self.start_bias is not None and not math.isfinite(self.start_bias):
            raise ValueError(f"start_bias must be finite, got {self.start_bias}")
        if self.whiten is not None and (not isinstance(self.whiten, int) or self.whiten < 0 or self.whiten == 1):
            raise ValueError(f"whiten must be 0 or at least 2 prompts, got {self.whiten}")
        for name, value in (("flips", self.flips), ("heads_per_flip", self.heads_per_flip)):
            if (name, value) != ("flips", None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be >= 1 and whole, got {value}")

    def settled(self, granularity: str) -> Recipe:
        """This recipe with its objective named: where it is None, the default for routers of this granularity.

        Args:
            granularity: ``"layer"`` or ``"head"``.

        Raises:
            ValueError: an option of counterfactuals is given, and the default is another objective.
        """
        if self.objective is not None:
            return self
        if granularity == "layer":
            return replace(self, objective="counterfactual")
        for option in fields(self):
            if option.name in _OF_FLIPS and (value := getattr(self, option.name)) != option.default:
                raise ValueError(
                    f"{option.name} must be left out, got {value}: it is of counterfactuals, and routers per head "
                    "learn straight through where no objective is named"
                )
        return replace(self, objective="straight_through")

    @classmethod
    def published(cls, **changes: Any) -> Recipe:
        """The recipe of the published code: straight-through, ``|d|`` and ``d^2``, multiplier rate 1e-3, routers as
        they are made. Its learning rate is one of the arguments: ``training_arguments(folder, learning_rate=5e-4)``.

        Args:
            changes: other fields of the recipe, or other values of these.
        """
        base: dict[str, Any] = {
            "objective": "straight_through",
            "multipliers": "published_abs",
            "multiplier_lr": 1e-3,
            "whiten": 0,
        }
        return cls(**{**base, **changes})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """The recipe of a paper: ``FluxConfig.preset`` and :func:`training_arguments` take the same names.

        Tasks called ``"retrieval"`` get the paper's target for such tasks, 0.45 or 0.7, all others 1.0: those of
        other names that need retrieval are named in ``targets``.

        Args:
            name: ``"flux"`` (arXiv 2604.07394: soft mixing) or ``"elastic"`` (arXiv 2601.17367: straight-through). Both
                with ``lambda1 * d + lambda2 * d^2`` and multiplier rate 1e-3, routers as they are made.
            changes: other fields of the recipe, or other values of these.

        Raises:
            ValueError: an unknown name, or a field that breaks a rule.
        """
        _check_paper(name)
        return cls(**{**PAPER_RECIPES[name], **changes})

    @property
    def goes_backward(self) -> bool:
        """Whether training goes backward through the backbone, where gradient checkpointing saves much memory.

        Raises:
            ValueError: the objective is not named (:meth:`settled`).
        """
        if self.objective is None:
            raise ValueError("objective must be named, got None: Recipe.settled names the default of a granularity")
        return self.objective != "counterfactual"

    @property
    def has_budget(self) -> bool:
        """Whether training keeps to a budget; else to target sparsities."""
        return not self.targets and self.default_target is None and self.multipliers == "inequality"

    @property
    def quality_budget(self) -> float:
        """The budget of all tasks without one of their own."""
        return DEFAULT_BUDGET if self.budget is None else self.budget

    def target(self, task: str) -> float:
        """The target sparsity of a task."""
        return self.targets.get(task, DEFAULT_TARGET if self.default_target is None else self.default_target)

    def check_tasks(self, tasks: Collection[str]) -> None:
        """ValueError where ``targets`` or ``budgets`` names a task that is not among ``tasks``."""
        for name in ("targets", "budgets"):
            if unknown := sorted(set(getattr(self, name)) - set(tasks)):
                raise ValueError(
                    f"{name} names tasks that the data lack: {', '.join(unknown)}; they have {', '.join(sorted(tasks))}"
                )

    @property
    def initial_bias(self) -> float:
        """Log-odds of full attention that new routers start with."""
        if self.start_bias is not None:
            return self.start_bias
        return 4.5 if self.goes_backward and self.objective != "even_odds" else 2.0

    def tau(self, progress: float) -> float:
        """The temperature after a share ``progress`` (0 to 1) of the training."""
        x = 1.0 if self.tau_share == 0 else min(1.0, max(0.0, progress) / self.tau_share)
        if self.tau_schedule == "exponential":
            return self.tau_start * math.pow(self.tau_end / self.tau_start, x)
        left = 1 - x if self.tau_schedule == "linear" else (1 + math.cos(math.pi * x)) / 2
        return self.tau_end + (self.tau_start - self.tau_end) * left

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "targets": dict(self.targets), "budgets": dict(self.budgets)}


def _check_paper(name: str) -> None:
    if name not in PAPER_RECIPES:
        raise ValueError(
            f"a preset must be one of {tuple(PAPER_RECIPES)}, got {name!r} (modes without a recipe: FluxConfig.preset)"
        )


def published_accumulation(batch_size: int) -> int:
    """Micro-batches with which the processes of ``torchrun``, each with ``batch_size`` sequences, reach the published
    batch: 48, or the next multiple of what they have together."""
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"per_device_train_batch_size must be a whole number of 1 or more, got {batch_size!r}")
    return math.ceil(PUBLISHED_BATCH / (batch_size * int(os.environ.get("WORLD_SIZE", "1"))))


def training_arguments(output_dir: str, preset: str | None = None, **changes: Any) -> TrainingArguments:
    """``TrainingArguments`` for routers, any of them open to ``changes``.

    Checkpoints, and in the end the routers, go to ``output_dir``.

    AdamW with betas 0.9 / 0.95 and weight decay 0.1; 300 steps; linear warm-up over 20 % of them, then cosine, as
    published (arXiv 2604.07394, section 4); the learning rate is 1e-3. Published is 5e-4: runs with
    :meth:`Recipe.published` pass ``learning_rate=5e-4``.

    Args:
        output_dir: a folder.
        preset: ``"flux"`` or ``"elastic"``, see :meth:`Recipe.preset`: learning rate 5e-4 and 48 sequences per step,
            one at a time in each process.
        changes: any argument, instead of what is said here.

    Raises:
        ValueError: an unknown preset.
    """
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "warmup_steps": 0.2,  # below 1: a share of the steps
        "lr_scheduler_type": "cosine",
        "max_steps": 300,
        "logging_steps": 10,
        "report_to": [],
    }
    if preset is not None:
        _check_paper(preset)
        batch_size = changes.get("per_device_train_batch_size", 1)
        defaults["learning_rate"] = PUBLISHED_LR
        defaults["per_device_train_batch_size"] = batch_size
        defaults["gradient_accumulation_steps"] = published_accumulation(batch_size)
    if "activation_checkpointing" in (f.name for f in fields(TrainingArguments)):  # its name from 5.24 on
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if old in changes:
                changes[old.replace("gradient", "activation")] = changes.pop(old)
    return TrainingArguments(output_dir=output_dir, **{**defaults, **changes})


_ALLOWED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("torch_compile", (False,), "routes, and which layers run, change from one forward of a step to the next"),
    ("use_liger_kernel", (False,), "its layers have no logits for us to take the answers' loss from"),
    ("label_smoothing_factor", (0,), "the loss is the cross-entropy of the answers themselves"),
    ("fp16_full_eval", (False,), "it would round the routers for good"),
    ("bf16_full_eval", (False,), "it would round the routers for good"),
    ("train_sampling_strategy", ("random", "sequential"), "lengths are known only once an example is tokenised"),
)
"""Of these TrainingArguments only some values work here: name, values, reason."""


FSDP_ACCELERATE = "1.12"
"""The oldest accelerate that FSDP2 was tried with."""


def checked_arguments(args: TrainingArguments, recipe: Recipe, model: nn.Module) -> TrainingArguments:
    """A copy of the ``TrainingArguments`` with what training routers takes; the given ones stay as they are.

    ``remove_unused_columns`` becomes False, as the batches have columns that are no arguments of the model, and
    ``ddp_find_unused_parameters`` too: it looks for the routers behind the logits, but their gradients take other ways.

    Raises:
        ValueError: an argument cannot work; the message names it, the rule and the value.
    """
    args = copy.copy(args)
    for name, allowed, why in _ALLOWED:
        if (value := getattr(args, name, allowed[0])) not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}: {why}")
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError("dispatch_batches must be False, got True: packed batches cannot be cut into equal parts")
    parallel: Any = getattr(args, "parallelism_config", None)
    for name in ("sp_size", "cp_size", "tp_size"):
        if parallel is not None and (size := getattr(parallel, name, 1)) > 1:
            raise ValueError(
                f"parallelism_config.{name} must be 1, got {size}: it is for stock attention functions. Sequences are "
                "spread over processes with FluxTrainer(sequence_parallel=...)"
            )
    found = importlib.metadata.version("accelerate")
    if args.fsdp and Version(found) < Version(FSDP_ACCELERATE):
        raise ValueError(f"fsdp needs accelerate >= {FSDP_ACCELERATE}, which cuts up what is frozen; found {found}")
    placed = {d for d in (getattr(model, "hf_device_map", None) or {}).values() if d not in ("cpu", "disk")}
    if args.n_gpu > 1 and placed <= {args.device, args.device.index, str(args.device)}:
        raise ValueError(
            f"n_gpu must be 1, got {args.n_gpu}: torch's DataParallel copies the model for every step, and routers in "
            "copies learn nothing. Start one process per GPU with torchrun, or show one GPU (CUDA_VISIBLE_DEVICES)"
        )
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise ValueError("use_reentrant must be False: reentrant checkpointing loses the routers' gradients")
    if args.ddp_find_unused_parameters and args.world_size > 1:
        raise ValueError(
            "ddp_find_unused_parameters must be False: it looks for the routers behind the logits, "
            "but their gradients take other ways, and every step reaches every router"
        )
    args.ddp_find_unused_parameters = args.remove_unused_columns = False
    return args
