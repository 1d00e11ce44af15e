"""What happens between the steps of a training."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .dry_run import duration, lengths, peak, reset_peak
from .report import training_report

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
    """Says at the start how much there is to do, also if nothing, and after the second step how long it will take."""

    def __init__(self, trainer: FluxTrainer) -> None:
        self.trainer, self.steps, self.began = trainer, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps = 0
        reset_peak(args.device)
        if not state.is_world_process_zero:
            return
        if state.global_step >= state.max_steps:
            tqdm.write(
                f"nothing is left to do: the checkpoint is at step {state.global_step}, and {state.max_steps} steps "
                "were asked for (max_steps; --steps of flux-ext train); the routers are those of the checkpoint"
            )
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
    """A progress bar with the two figures of the latest sequences that matter most behind it, from the first step on,
    instead of a line per report; and a table of the tasks at the end."""

    def __init__(self, trainer: FluxTrainer) -> None:
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is None:
            return
        monitor = self.trainer.monitor
        figures = monitor.figures(monitor.recent.sums(), self.trainer.objective.multipliers)
        self.training_bar.set_postfix_str(in_short(figures, monitor.tasks))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float | None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Nothing: the bar has the figures."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if state.is_world_process_zero and self.trainer.monitor.recent.count:
            tqdm.write(training_report(self.trainer))


def in_short(figures: Mapping[str, float], tasks: Sequence[str]) -> str:
    """What a line has room for, whatever the number of tasks: sparsity in use; and how much of the budget is lost, or
    which task is furthest from its own budget or target. All figures are in the log.

    Args:
        figures: those of a :class:`~.monitor.Monitor`.
        tasks: the tasks' names.
    """
    parts = [f"{figures['sparsity']:.0%} sparse"] if "sparsity" in figures else []
    lost, short = {}, {}
    for label, prefix in (("", ""), *((f"{task} ", f"{task}/") for task in tasks)):
        if f"{prefix}budget" in figures and f"{prefix}extra_loss" in figures:
            lost[label] = figures[f"{prefix}extra_loss"], figures[f"{prefix}budget"]
        if f"{prefix}target" in figures and f"{prefix}sparsity" in figures:
            short[label] = figures[f"{prefix}sparsity"], figures[f"{prefix}target"]
    if lost:
        label = max(lost, key=lambda task: lost[task][0] - lost[task][1])
        parts.append("{}{:+.3f} of {:.3f} nats lost".format(label, *lost[label]))
    if short:
        label = max(short, key=lambda task: short[task][1] - short[task][0])
        parts.append("{}{:.2f} of {:.2f}".format(label, *short[label]))
    return ", ".join(parts)


class StopOnInterrupt(TrainerCallback):
    """Within its ``with`` block Ctrl-C ends a training after the step that runs, with a checkpoint.

    A second one ends it at once, and so does one before the first step, or in a training of several processes: they
    would not agree on the step.
    """

    def __init__(self) -> None:
        self.asked = self.running = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        if self.asked or not self.running:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come while something is being printed.
        os.write(2, b"\nflux-ext: this step ends, then a checkpoint is written; Ctrl-C again stops at once\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.running = args.world_size == 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.running = False
