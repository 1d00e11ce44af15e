"""The Hugging Face Trainer with routers as the only thing that learns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from .. import strict_json
from ..examples import Tokenizer
from ..models import patching
from ..models.patching import evaluation_mode
from ..routers.modules import Router
from ..transformers_seam import check_trainer, sharded_at_load
from .backbone import PatchedModel, answered, losses
from .budget import DenseLosses, Price
from .calibration import MARGIN, TRIES, Calibration, Shared, calibrate
from .callbacks import CostReport, RouterProgress, StepGuard
from .checkpoint import (
    ARGUMENTS_FILE,
    RECIPE_FILE,
    Checkpoint,
    begin,
    check_output_folder,
    check_progress,
    dtype_of,
    finish,
    flush,
    latest_checkpoint,
    objective_file,
    what_is_lost,
)
from .config import DEFAULT_WHITEN, Recipe, checked_arguments, training_arguments
from .data import TOO_SHORT, PackedCollator, PaddedCollator, RouterDataset, Tokens, digest, nothing_hidden
from .distributed import alone, average_gradients, keep_whole, most, spread
from .dry_run import Cost, Measured, measure
from .monitor import Monitor
from .objective import Objective, Step, full_route, make_objective
from .report import training_record
from .sequence_parallel import batch_of, make_group
from .start import check_pooled, is_new, pooled_states, start_at, whiten

check_trainer(Trainer)  # an override of a method that was renamed would never be called

# Arguments of the Trainer that nothing here would use; giving one is an error.
_UNUSED = ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")


class FluxTrainer(Trainer):
    """Trains the routers of a patched model; the backbone is frozen.

    A checkpoint holds the routers (as :meth:`FluxRouters.save_pretrained` writes them), the recipe and the
    objective's state (one file per process) with the dense losses that were measured, and what every Trainer keeps for
    resuming. Metrics go to any logger and to the progress bar, losses in nats per answer token:

    - ``sparsity`` under the routers' own routes; ``routes_vary``, the share of layers (or heads) that did not route the
      latest sequences all alike (where it is 0 at the end, a warning says so); ``routes_tell_task``, the mutual
      information of a layer's (or head's) route and the task, in bits, in the mean over them.
    - with a budget: ``price`` (nats per unit of sparsity), ``extra_loss`` (what the own routes lose), ``dense_loss``
      and ``budget``; ``{task}/extra_loss``, and the price and budget of a task that has its own.
    - with targets: ``{task}/target``, ``/lambda1`` and ``/lambda2``.
    - ``{task}/sparsity`` and ``{task}/lm_loss`` of the routes that training takes, some of which explore.

    Routers that are still as they were made start at the recipe's :attr:`~.config.Recipe.initial_bias`. A sequence
    all of whose labels are masked counts as none.

    Args:
        model: a patched causal language model.
        recipe: how to train; ``trainer.recipe`` has its objective named.
        args: ``TrainingArguments``; default :func:`~.config.training_arguments`, with gradient checkpointing where the
            recipe :attr:`~.config.Recipe.goes_backward`. A copy is used, see :func:`~.config.checked_arguments`.
        train_dataset: a :class:`~.data.RouterDataset`, whose ``tasks`` name the constraints.
        packed: pack sequences into one row instead of padding them.
        tokenizer: gives the padding token.
        sequence_parallel: processes that share each sequence, for those that are too long for one GPU: each has an
            equal part of the tokens (:mod:`~.sequence_parallel`). It divides the number of processes.
        kwargs: as for ``Trainer``.

    Raises:
        TypeError: the dataset does not name its tasks.
        ValueError: the model is not patched, a target names a task that the data lack, or an option cannot work. In
            training: a batch without any answer token, or a checkpoint that is damaged or of another training.
        RuntimeError: in training, a loss or gradient that is not finite; the routers are as after the step before.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Dataset[Tokens],
        packed: bool = False,
        tokenizer: Tokenizer | None = None,
        sequence_parallel: int = 1,
        **kwargs: Any,
    ) -> None:
        if not getattr(train_dataset, "tasks", None):
            raise TypeError(f"train_dataset must have tasks, like a RouterDataset, got {type(train_dataset).__name__}")
        self.tasks: tuple[str, ...] = tuple(train_dataset.tasks)  # type: ignore[attr-defined]
        recipe = recipe or Recipe()
        recipe.check_tasks(self.tasks)
        for name in _UNUSED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be left out: the loss is the objective's, and no predictions are kept")
        self.routers = patching.get_routers(model)
        config = self.routers.config
        self.recipe = recipe.settled(config.granularity)
        if isinstance(train_dataset, RouterDataset):
            longest = nothing_hidden(train_dataset, self.routers)
            if longest is not None:
                warnings.warn(f"there is nothing to learn: {TOO_SHORT.format(longest)}", stacklevel=2)
        if sharded_at_load(model):
            raise ValueError(
                "model must be whole, it was sharded while it was loaded (distributed_config), and the routers' "
                "gradients would not be averaged: load it without, and shard it with fsdp=True"
            )
        if args is None:
            args = training_arguments("flux_routers", gradient_checkpointing=self.recipe.goes_backward)
        args = checked_arguments(args, self.recipe, model)
        self.objective: Objective = make_objective(
            self.recipe,
            self.tasks,
            len(self.routers.layers),
            (config.num_kv_heads or 1) if config.granularity == "head" else 1,
            seed=int(args.seed or 0) + 1000 * self._stream(args, sequence_parallel),
        ).to(args.device)
        self._layer_index = config.routed_layers()
        self.dense_losses = DenseLosses()
        self.monitor = Monitor(self.tasks, self.objective.num_layers * self.objective.num_heads)
        model.requires_grad_(False)
        self.routers.requires_grad_(True)
        if kwargs.get("data_collator") is None:
            pad = getattr(tokenizer or kwargs.get("processing_class"), "pad_token_id", None)
            kwargs["data_collator"] = PackedCollator() if packed else PaddedCollator(0 if pad is None else pad)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.group = make_group(sequence_parallel) if sequence_parallel != 1 else None
        self.stream = self._stream(args, sequence_parallel)
        if self.group is not None:
            patching.check_sequence_parallel(model, self.group)
            if packed:
                raise ValueError("packed must be False with sequence_parallel: sequences are spread one by one")
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed must be off: routers and multipliers would not be whole in its checkpoints. Several "
                "processes train with torchrun: DDP, or FSDP where the model is too large for one GPU"
            )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp needs a GPU for each process, this one is on {args.device}: accelerate would ignore it"
            )
        self.sharded = self.is_fsdp_enabled
        if self.sharded:
            keep_whole(self.accelerator, self.routers)
            self.is_fsdp_enabled = False  # to the Trainer: what it saves and loads is whole in every process
        self.agree = most(self.args.device) if self.sharded else alone
        # Our loss is a mean over the micro-batch: the Trainer is to divide it by the number of micro-batches in a step.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        self.calibration: Calibration | None = None
        self._begins = self._dry = False
        self._turn: int | None = None  # whose batch runs, where processes share sequences
        self.add_callback(StepGuard(self))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(CostReport(self))
            self.add_callback(RouterProgress(self))
        for router in self._layer_routers():
            start_at(router, self.recipe.initial_bias)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's.

        Raises:
            ValueError: before it begins: the checkpoint is damaged, or the routers could not be saved in its output
                folder.
            KeyboardInterrupt: with a message that says which steps are lost.
        """
        folder = Path(self.args.output_dir or ".")
        resumed = latest_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint
        if resumed:  # first: its own error says more than that a damaged checkpoint is not one of ours
            Checkpoint.read(Path(resumed), self.stream)
        if self.args.should_save:
            check_output_folder(folder)
            self.routers.check_savable(folder)
        self._begins, self.calibration = not resumed, None
        try:
            result = super().train(resumed or resume_from_checkpoint, *args, **kwargs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_is_lost(folder, self.state.global_step, self.state.max_steps)) from None
        if advice := self.monitor.collapse():
            warnings.warn(advice, stacklevel=2)
        return result

    def dry_run(self) -> Cost:
        """What training is going to cost, measured by some steps of it. Nothing is changed, and no file is written."""
        handler = self.callback_handler
        callbacks, handler.callbacks = handler.callbacks, [c for c in handler.callbacks if isinstance(c, StepGuard)]
        modes = [(module, module.training) for module in self.model.modules()]  # type: ignore[union-attr]
        self._dry, self._begins = True, False
        try:
            super().train()
        except Measured as measured:
            return measured.cost
        finally:
            self._dry = self.is_in_train = False
            handler.callbacks = callbacks
            for module, training in modes:
                module.training = training
        raise RuntimeError("the training did not begin")

    def calibrate(
        self, data: Dataset[Tokens] | None = None, *, margin: float = MARGIN, tries: int = TRIES
    ) -> Calibration:
        """After training: shifts the routers' log-odds so that they are the sparsest that keeps to the budget, as
        measured (:func:`~.calibration.calibrate`); every process must call it. Save them afterwards (``save_model``).

        Args:
            data: sequences that training has not seen (default: ``eval_dataset``, or else those of the training).
            margin: standard errors by which the mean loss must stay below the budget.
            tries: thresholds that are measured.

        Raises:
            TypeError: the data do not name their tasks.
            ValueError: the recipe has targets, or the data lack a task that has a budget of its own.
        """
        self.calibration = calibrate(
            cast(nn.Module, self.model),
            next(given for given in (data, self.eval_dataset, self.train_dataset) if given is not None),
            self.recipe,
            collator=self.data_collator,
            batch_size=self.args.per_device_train_batch_size,
            margin=margin,
            tries=tries,
            device=self.args.device,
            shared=Shared(self.stream, self.accelerator.num_processes // self._turns, self.group),
            progress=not self.args.disable_tqdm,
        )
        return self.calibration

    def _layer_routers(self) -> list[Router]:
        return [cast(Router, router) for router in self.routers.layers]

    def begin_training(self) -> None:
        """What comes before the first step, when the model is where it is going to be trained."""
        self.monitor.clear()
        if self.accelerator.num_processes > 1:
            spread(self.routers)
        if self._dry:
            raise Measured(measure(self, self.model_wrapped))
        if self._begins:
            self._whiten()
            if self.accelerator.num_processes > 1:
                spread(self.routers)

    def _whiten(self) -> None:
        """Fits new routers to prompts taken evenly from the training data, the same in every process."""
        if self.recipe.whiten == 0:
            return
        routers = self._layer_routers()
        new = [is_new(router) for router in routers]
        data: Any = self.train_dataset
        model: Any = self.model
        count = min(self.recipe.whiten or DEFAULT_WHITEN, len(data))
        if not any(new) or count < 2:
            if self.recipe.whiten is not None:
                why = "the data have one example" if any(new) else "the routers are not new"
                warnings.warn(f"whiten={self.recipe.whiten} has no effect: {why}", stacklevel=2)
            return
        rows = [i * len(data) // count for i in range(count)]
        size = self.args.per_device_train_batch_size
        batches = [rows[i : i + size] for i in range(0, count, size)]
        shown = tqdm(batches, desc="looking at prompts", disable=self.args.disable_tqdm)
        inputs = (self._prepare_inputs(self.data_collator([data[i] for i in batch])) for batch in shown)
        with evaluation_mode(model):
            pooled = pooled_states(model, inputs, self.group)
        for states in pooled:
            check_pooled(states)  # all of them, before the first router changes
        for router, states, fit in zip(routers, pooled, new, strict=True):
            if fit:
                whiten(router, states)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The objective's loss; outside training the mean loss under the routers' own hard routes."""
        inputs = answered(inputs)
        if not model.training:
            loss = losses(model, inputs, self.group).mean()
            return (loss, {}) if return_outputs else loss
        objective = self.objective
        routed = PatchedModel(
            model, inputs, objective.num_layers, objective.num_heads, self._layer_index, self.agree, self.group
        )
        progress = self.state.global_step / max(1, self.state.max_steps)
        tasks = inputs["task_ids"]
        step = objective(routed, tasks, progress)
        routed.keep_step()
        dense = torch.full_like(step.deployed, torch.nan)
        rows = step.deployed.isfinite().nonzero()[:, 0]
        if isinstance(objective.multipliers, Price):
            dense[rows] = self.dense_losses.get(inputs, rows, partial(routed.loss_again, full_route, 0), self.agree)
        self._check_finite(tasks, step)
        if self.group is None or self._turn == self.group.rank:
            self.monitor.add(tasks, step, dense)  # where processes share it, in the one whose batch it is
        if self.accelerator.sync_gradients and self._turn in (None, self._turns - 1):
            self._ascend()
        loss = step.loss / self._turns
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, of the batches of all processes that share sequences."""
        loss = torch.zeros((), device=self.args.device)
        for batch, last in self._batches(inputs):
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss += super().training_step(model, batch, *args, **kwargs)
        if self.sharded and self.accelerator.sync_gradients:
            average_gradients(self.routers)  # FSDP reduces those only of what it cuts up
        return loss

    def _batches(self, inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
        """The batches of the processes that share sequences, in turn, and whether it is the last one."""
        if self.group is None:
            yield inputs, True
            return
        try:
            for turn in range(self.group.size):
                self._turn = turn
                yield batch_of(inputs, self.group, turn, self.args.device), turn == self.group.size - 1
        finally:
            self._turn = None

    @property
    def _turns(self) -> int:
        return 1 if self.group is None else self.group.size

    @staticmethod
    def _stream(args: TrainingArguments, sequence_parallel: int) -> int:
        """Which draws are this process's: those of its group."""
        return int(args.process_index or 0) // max(1, sequence_parallel)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; each module of the model is left in the mode it was in."""
        with evaluation_mode(self.model):  # type: ignore[arg-type]
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            found = [cast(Tensor, self.compute_loss(model, batch)).detach() for batch, _ in self._batches(inputs)]
        return found[0 if self.group is None else self.group.rank], None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, over the routers' parameters."""
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            group = {"params": list(self.routers.parameters()), "weight_decay": self.args.weight_decay}
            self.optimizer = kind([group], **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the tasks' figures since the last report."""
        if "loss" in logs:
            logs.update(self.monitor.figures(self.monitor.since_log(), self.objective.multipliers))
        super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = strict_json.finite(self.state.log_history[-1])  # it is going to be a JSON file

    def _check_finite(self, tasks: Tensor, step: Step) -> None:
        """RuntimeError, before any gradient, where a loss is not."""
        total = step.loss.detach().expand_as(step.lm_loss)
        rows = torch.stack([step.lm_loss, total, step.sparsity]).double().cpu()
        if not bool(rows.isfinite().all()):
            raise RuntimeError(
                f"step {self.state.global_step + 1}: the loss must be finite, got {float(rows[1, 0])} from the "
                f"sequences' {rows[0].tolist()} (tasks {[self.tasks[t] for t in tasks.tolist()]}); training stopped"
            )

    def _ascend(self) -> None:
        """One step of the multipliers or the price, with the sequences of all micro-batches and ranks."""

        def of_all_processes(own: Tensor) -> Tensor:
            own = own.to(self.args.device)
            return cast(Tensor, self.accelerator.reduce(own)) if self.accelerator.num_processes > 1 else own

        sums = self.monitor.end_step(of_all_processes)
        m, count = self.objective.multipliers, sums["count"]
        if isinstance(m, Price):
            m.ascend(sums["deployed"], sums["extra"], sums["squares"], sums["dense"])
        else:
            m.ascend((sums["sparsity"] / count).float(), count, (sums["own_sparsity"] / count).float())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:  # from transformers 5.23 on, every process calls this method
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.routers.save_pretrained(folder, model_card_kwargs={"training": training_record(self)})
        self._save_objective(folder)
        recipe = {"tasks": list(self.tasks), "dtype": dtype_of(self.model), **self.recipe.to_dict()}
        if examples := getattr(self.train_dataset, "examples", None):
            recipe["data"] = digest(examples)
        (folder / RECIPE_FILE).write_text(strict_json.dumps(recipe), encoding="utf-8")
        torch.save(self.args, folder / ARGUMENTS_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; marked as whole in the end, and only then may older ones go."""
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if folder.is_dir():
            flush(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if not self.args.save_only_model:  # which nothing can go on from
                finish(folder, self.accelerator.num_processes, self.accelerator.num_processes // self._turns)
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._save_objective(Path(output_dir))  # `_save` is for the first process only

    def _save_objective(self, folder: Path) -> None:
        if self.group is not None and self.group.rank > 0:
            return  # it is the same in the whole group
        state = {k: v.contiguous() for k, v in self.objective.state_dict().items()}
        save_file(state | self.dense_losses.tensors(), folder / objective_file(self.stream))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint = Checkpoint.read(folder, self.stream)
        check_progress(folder, self.args.process_index, self._optimizer_options())
        self._go_on_from(checkpoint)
        if self.is_world_process_zero():
            checkpoint.warn_of_dtype(dtype_of(self.model))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._go_on_from(Checkpoint.read(Path(self.state.best_model_checkpoint), self.stream))

    def _optimizer_options(self) -> dict[str, Any]:
        """What a resumed optimiser keeps from its checkpoint, as the arguments have it now; nothing of a given one."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return {}
        return {"initial_lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        """Takes over routers, multipliers and draws; targets and all other numbers are those of the recipe here.

        Raises:
            ValueError: what cannot change within a training is another here; nothing was changed.
        """
        if difference := self.routers.config.differences(checkpoint.routers.config):
            raise ValueError(f"the routers in {checkpoint.folder} have other settings: {difference}")
        checkpoint.check_goes_on(self.recipe, self.tasks)
        state, dense = self.objective.state_dict(), DenseLosses()
        for rank, tensors in checkpoint.objectives.items():
            file = checkpoint.folder / objective_file(rank)
            try:
                dense.update(tensors)
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
            for name, x in state.items():
                if name not in tensors or tensors[name].shape != x.shape:
                    found = list(tensors[name].shape) if name in tensors else "missing"
                    raise ValueError(f"{file} is damaged: {name} must be of shape {list(x.shape)}, it is {found}")
        saved_state = checkpoint.objectives.get(self.stream)
        if saved_state is None:  # there were fewer processes: this one draws anew
            saved_state = {k: x for k, x in checkpoint.objectives[0].items() if k.startswith("multipliers.")}
        state |= {name: saved_state[name] for name in state if name in saved_state}
        self.routers.load_state_dict(checkpoint.routers.state_dict())
        self.objective.load_state_dict(state)
        self.dense_losses.update(dense.tensors())
