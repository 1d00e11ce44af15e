"""The Hugging Face Trainer with routers as the only thing that learns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainingArguments

from .. import patching
from ..router import FULL_BIAS
from .backbone import PatchedModel, losses
from .config import Recipe, training_arguments
from .data import PackedCollator, PaddedCollator
from .objective import Objective, make_objective

RECIPE_FILE = "recipe.json"
OBJECTIVE_FILE = "objective.safetensors"


class FluxTrainer(Trainer):
    """Trains the routers of a patched model; the backbone is frozen.

    A checkpoint holds the routers (as :meth:`FluxRouters.save_pretrained` writes them), the recipe and the
    objective's state (one file per process), and what every Trainer keeps for resuming. Metrics per task go to any
    logger and to the progress bar: ``{task}/sparsity``, ``/target``, ``/lambda1``, ``/lambda2`` and ``/lm_loss``
    (nats per answer token).

    Args:
        model: a patched causal language model.
        recipe: how to train.
        args: ``TrainingArguments``; default :func:`~.config.training_arguments`.
        train_dataset: a :class:`~.data.RouterDataset`, whose ``tasks`` name the constraints.
        packed: pack sequences into one row instead of padding them.
        tokenizer: gives the padding token.
        kwargs: as for ``Trainer``.

    Raises:
        ValueError: the model is not patched, a target names a task that the data lack, or an option cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Dataset,
        packed: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe or Recipe()
        self.tasks: tuple[str, ...] = train_dataset.tasks  # type: ignore[attr-defined]
        unknown = sorted(set(self.recipe.targets) - set(self.tasks))
        if unknown:
            raise ValueError(f"targets names tasks that the data lack: {', '.join(unknown)}; they have {self.tasks}")
        self.routers = patching.get_routers(model)
        if self.routers.config.pattern == "triangle":
            # Prompt and answer share one forward here, whose last rows would be the answer's, not the prompt's.
            raise ValueError('pattern="triangle" cannot be trained: train with "streaming" and change it afterwards')
        args = args or training_arguments("flux_routers")
        if args.device.type == "cuda" and self.recipe.objective != "counterfactual":
            raise ValueError(
                f"objective {self.recipe.objective!r} needs the gradient of attention, which CUDA has not yet: "
                'use "counterfactual", or the CPU'
            )
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if checkpointing.get("use_reentrant"):
            raise ValueError("use_reentrant must be False: reentrant checkpointing loses the routers' gradients")
        if args.ddp_find_unused_parameters and args.world_size > 1:
            raise ValueError(
                "ddp_find_unused_parameters must be False: it looks for the routers behind the logits, "
                "but their gradients take other ways, and every step reaches every router"
            )
        args.ddp_find_unused_parameters = False
        model.requires_grad_(False)
        self.routers.requires_grad_(True)
        if "data_collator" not in kwargs:
            pad = getattr(tokenizer, "pad_token_id", None)
            kwargs["data_collator"] = PackedCollator() if packed else PaddedCollator(0 if pad is None else pad)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        # Our loss is a mean per batch: the Trainer shall divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.can_return_loss = True
        config = self.routers.config
        self.objective: Objective = make_objective(
            self.recipe,
            self.tasks,
            len(self.routers.layers),
            (config.num_kv_heads or 1) if config.granularity == "head" else 1,
            seed=int(args.seed or 0) + 1000 * int(args.process_index or 0),
        ).to(args.device)
        self._layer_index = config.routed_layers()
        self._step_sums = torch.zeros(3, len(self.tasks), dtype=torch.float64)
        self._log_sums = torch.zeros_like(self._step_sums)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RouterProgress())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss; outside training the mean loss under the routers' own hard routes."""
        if not model.training:
            loss = losses(model, inputs).mean()
            return (loss, {}) if return_outputs else loss
        routed = PatchedModel(model, inputs, self.objective.num_layers, self.objective.num_heads, self._layer_index)
        progress = self.state.global_step / max(1, self.state.max_steps)
        tasks = inputs["task_ids"]
        step = self.objective(routed, tasks, progress)
        self._note(tasks, step.sparsity, step.lm_loss)
        if self.accelerator.sync_gradients:
            self._ascend()
        return (step.loss, {}) if return_outputs else step.loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple:
        """The loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments name, over the routers' parameters."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            group = {"params": list(self.routers.parameters()), "weight_decay": self.args.weight_decay}
            self.optimizer = kind([group], **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the tasks' figures since the last report."""
        if "loss" in logs:
            count, sparsity, lm_loss = self._log_sums
            for i, task in enumerate(self.tasks):
                if count[i]:
                    logs[f"{task}/sparsity"] = float(sparsity[i] / count[i])
                    logs[f"{task}/lm_loss"] = float(lm_loss[i] / count[i])
                m = self.objective.multipliers
                logs[f"{task}/target"] = float(m.target[i])
                logs[f"{task}/lambda1"], logs[f"{task}/lambda2"] = float(m.lambda1[i]), float(m.lambda2[i])
            self._log_sums.zero_()
        super().log(logs, *args, **kwargs)

    def _note(self, tasks: Tensor, sparsity: Tensor, lm_loss: Tensor) -> None:
        rows = torch.stack([torch.ones_like(sparsity), sparsity, lm_loss]).double().cpu()
        self._step_sums.index_add_(1, tasks.cpu(), rows)

    def _ascend(self) -> None:
        """One step of the multipliers, with the sequences of all micro-batches and ranks."""
        sums = self._step_sums.clone().to(self.args.device)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums)
        self._step_sums.zero_()
        count, sparsity, _ = sums.float()
        self.objective.multipliers.ascend(sparsity / count, count)
        self._log_sums += sums.cpu()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.routers.save_pretrained(folder)
        self._save_objective(folder)
        recipe = {"tasks": list(self.tasks), **self.recipe.to_dict()}
        (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
        torch.save(self.args, folder / "training_args.bin")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._save_objective(Path(output_dir))  # `_save` runs on the first process only

    def _objective_file(self) -> str:
        """Multipliers are the same on all processes, draws are each one's own."""
        rank = self.args.process_index
        return OBJECTIVE_FILE if rank == 0 else f"objective-{rank}.safetensors"

    def _save_objective(self, folder: Path) -> None:
        state = {k: v.contiguous() for k, v in self.objective.state_dict().items()}
        save_file(state, folder / self._objective_file())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for name in (RECIPE_FILE, OBJECTIVE_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is no checkpoint of a FluxTrainer: it has no {name}")
        recipe = json.loads((folder / RECIPE_FILE).read_text())
        for name, own in {"tasks": list(self.tasks), "objective": self.recipe.objective}.items():
            if recipe.get(name) != own:
                raise ValueError(f"{folder} was trained with {name} {recipe.get(name)!r}, not {own!r}")
        saved = type(self.routers).from_pretrained(folder)
        if difference := self.routers.config.differences(saved.config):
            raise ValueError(f"the routers in {folder} have other settings: {difference}")
        self.routers.load_state_dict(saved.state_dict())
        draws = folder / self._objective_file()
        if draws.is_file():
            self.objective.load_state_dict(load_file(draws))
        else:  # there were fewer processes: this one draws anew
            first = load_file(folder / OBJECTIVE_FILE)
            common = {k: v for k, v in first.items() if k.startswith("multipliers.")}
            self.objective.load_state_dict({**self.objective.state_dict(), **common})

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class RouterProgress(ProgressCallback):
    """A progress bar with each task's sparsity and loss behind it, instead of a line per report."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[override]
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {k: f"{v:.2f}" for k, v in logs.items() if k.endswith(("/sparsity", "/lm_loss")) and v is not None}
        if shown:
            self.training_bar.set_postfix(shown)


@torch.no_grad()
def set_initial_bias(routers: nn.Module, log_odds: float) -> None:
    """Lets fresh routers start at these log-odds of full attention (their default is the published 4.5)."""
    for router in routers.layers:  # type: ignore[union-attr]
        router.classifier[-1].bias[1] += log_odds - FULL_BIAS  # type: ignore[index,operator,union-attr]


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in a folder, or None."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(os.fspath(folder)) if Path(folder).is_dir() else None
