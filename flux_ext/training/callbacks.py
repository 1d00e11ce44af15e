"""What happens between the steps of a training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .dry_run import duration, lengths, peak, reset_peak

if TYPE_CHECKING:
    from .trainer import FluxTrainer


class StepGuard(TrainerCallback):
    """Lets no gradient that is not finite reach the routers, and no training begin with sums of an earlier one."""

    def __init__(self, trainer: FluxTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_training()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the gradient scaler skips such a step, and takes a smaller scale
            return
        norm = nn.utils.get_total_norm(p.grad for p in self.trainer.routers.parameters() if p.grad is not None)
        if not bool(norm.isfinite()):
            raise RuntimeError(
                f"step {state.global_step + 1}: the gradient of the routers must be finite, its norm is {float(norm)}"
            )


class CostReport(TrainerCallback):
    """Says at the start how much there is to do, and after the second step how long it is going to take."""

    def __init__(self, trainer: FluxTrainer) -> None:
        self.trainer, self.steps, self.began = trainer, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps = 0
        reset_peak(args.device)
        if not state.is_world_process_zero:
            return
        found = lengths(self.trainer, 32)
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        tqdm.write(
            f"{state.max_steps - state.global_step} steps of {sequences} sequences, about "
            f"{found.mean * sequences:,.0f} tokens a step; the longest sequence has about {found.most:,}"
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == 2 and state.is_world_process_zero:  # the first one is slower
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            seconds = time.perf_counter() - self.began
            tqdm.write(
                f"a step takes about {duration(seconds)}, what is left about "
                f"{duration(seconds * (state.max_steps - state.global_step))}; {peak(args.device) / 1e9:.3g} GB of "
                "memory at the peak so far"
            )


class RouterProgress(ProgressCallback):
    """A progress bar with sparsity and losses behind it, instead of a line per report."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "price" in logs:
            names: tuple[str, ...] = ("price", "extra_loss", "sparsity")
        else:
            names = ("/sparsity", "/lm_loss")
        shown = {k: f"{v:.3g}" for k, v in logs.items() if k.endswith(names) and v is not None}
        if shown:
            self.training_bar.set_postfix(shown)
