"""The options of the routers' training; all others are the Hugging Face ``TrainingArguments``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

ObjectiveName = Literal["counterfactual", "soft", "straight_through"]
MultiplierForm = Literal["inequality", "published", "published_abs"]
ScheduleName = Literal["cosine", "linear", "exponential"]

OBJECTIVES = ("counterfactual", "soft", "straight_through")
MULTIPLIER_FORMS = ("inequality", "published", "published_abs")
SCHEDULES = ("cosine", "linear", "exponential")


@dataclass(frozen=True)
class Recipe:
    """How routers are trained.

    Args:
        objective: ``"counterfactual"`` (exact worth of one layer at a time, no backward pass through the
            backbone), ``"soft"`` (Flux Attention, arXiv 2604.07394: Gumbel-weighted mixture) or
            ``"straight_through"`` (Elastic Attention, arXiv 2601.17367, and both published codes: hard
            forward, soft gradient).
        targets: per task, the share of sparse attention to reach, in [0, 1].
        default_target: the target of tasks that ``targets`` does not name.
        multipliers: ``"inequality"``: ``lambda1 * (target - sparsity)``, a price that may fall again once
            the target is met. ``"published"``: ``lambda1 * d + lambda2 * d^2`` with ``d = sparsity -
            target``; ``"published_abs"``: with ``|d|``, as in the published code.
        multiplier_lr: step of the multipliers' gradient ascent (published: 1e-3), in nats per unit of
            sparsity.
        tau_start, tau_end, tau_share, tau_schedule: temperature of the Gumbel relaxation; it goes from start
            to end over the first ``tau_share`` of the steps and stays there.
        start_bias: log-odds of full attention at the start. None: the objective's own, 4.5 as published, 2
            for counterfactuals, whose exploration comes from sampling.
        flips: counterfactuals per sequence and step; they share one base forward.
        heads_per_flip: with head-level routing, KV heads switched together.
        logit_bound: log-odds beyond which a counterfactual router is pulled back, so that it can still turn.
        delta_clip: largest worth of one flip that counts, in nats.
    """

    objective: ObjectiveName = "counterfactual"
    targets: Mapping[str, float] = field(default_factory=dict)
    default_target: float = 0.5
    multipliers: MultiplierForm = "inequality"
    multiplier_lr: float = 0.02
    tau_start: float = 1.5
    tau_end: float = 1.0
    tau_share: float = 0.6
    tau_schedule: ScheduleName = "cosine"
    start_bias: float | None = None
    flips: int = 1
    heads_per_flip: int = 1
    logit_bound: float = 4.0
    delta_clip: float = 10.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("multipliers", MULTIPLIER_FORMS),
            ("tau_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for task, target in {"default_target": self.default_target, **self.targets}.items():
            if not 0 <= target <= 1:
                raise ValueError(f"the target sparsity of {task} must lie in [0, 1], got {target}")
        for name in ("tau_start", "tau_end", "logit_bound", "delta_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.tau_share <= 1:
            raise ValueError(f"tau_share must lie in [0, 1], got {self.tau_share}")
        if self.multiplier_lr < 0:
            raise ValueError(f"multiplier_lr must be >= 0, got {self.multiplier_lr}")
        for name in ("flips", "heads_per_flip"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @classmethod
    def published(cls, **changes: Any) -> Recipe:
        """The recipe of the published code: straight-through, ``|d|`` and ``d^2``, multiplier rate 1e-3."""
        base: dict[str, Any] = {
            "objective": "straight_through",
            "multipliers": "published_abs",
            "multiplier_lr": 1e-3,
        }
        return cls(**{**base, **changes})

    def target(self, task: str) -> float:
        """The target sparsity of a task."""
        return self.targets.get(task, self.default_target)

    @property
    def initial_bias(self) -> float:
        """Log-odds of full attention that new routers start with."""
        if self.start_bias is not None:
            return self.start_bias
        return 2.0 if self.objective == "counterfactual" else 4.5

    def tau(self, progress: float) -> float:
        """The temperature after a share ``progress`` (0 to 1) of the training."""
        x = 1.0 if self.tau_share == 0 else min(1.0, max(0.0, progress) / self.tau_share)
        if self.tau_schedule == "exponential":
            return self.tau_start * (self.tau_end / self.tau_start) ** x
        left = 1 - x if self.tau_schedule == "linear" else (1 + math.cos(math.pi * x)) / 2
        return self.tau_end + (self.tau_start - self.tau_end) * left

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "targets": dict(self.targets)}


def training_arguments(output_dir: str, **changes: Any) -> Any:
    """``TrainingArguments`` with the published optimiser settings, any of them open to ``changes``.

    AdamW with learning rate 5e-4, betas 0.9 / 0.95 and weight decay 0.1; linear warm-up over 20 % of the
    steps, then cosine (arXiv 2604.07394, section 4).
    """
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "learning_rate": 5e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "warmup_steps": 0.2,  # below 1: a share of the steps
        "lr_scheduler_type": "cosine",
        "max_steps": 300,
        "logging_steps": 10,
        "report_to": [],
        # The batches have columns of ours, which are no arguments of the model.
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir=output_dir, **{**defaults, **changes})
