"""What the steps of a training add up: for the price or the multipliers, the log, and the table at the end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .budget import Price
from .objective import Multipliers, Step

SUMS = ("count", "sparsity", "own_sparsity", "lm_loss", "deployed", "extra", "squares", "dense")
"""What is summed over the sequences of each task; the last four over those that ran under the routers' own routes:
how many, what they lose against dense, its square, and the dense loss."""


class Monitor:
    """The sums of a training's steps, and what they say.

    Args:
        tasks: the tasks' names; T of them.
        units: the places that decide, U: a layer, or a KV head of one.
    """

    def __init__(self, tasks: Sequence[str], units: int) -> None:
        self.tasks = tuple(tasks)
        self.routes, self.recent = RouteWatch(), RecentSums(len(tasks))
        self._since_log = torch.zeros(len(SUMS), len(tasks), dtype=torch.float64)
        self._step = torch.zeros_like(self._since_log)
        self._step_routes = torch.zeros(len(tasks), units, dtype=torch.float64)

    def clear(self) -> None:
        """Forgets all sums."""
        for sums in (self._since_log, self._step, self._step_routes):
            sums.zero_()
        self.routes.clear()
        self.recent.clear()

    def add(self, tasks: Tensor, step: Step, dense: Tensor) -> None:
        """A micro-batch of the step that runs.

        Args:
            tasks: int64 ``[B]``, the sequences' tasks.
            step: what the objective gave.
            dense: ``[B]``, the losses with everything full; NaN where they were not asked for.
        """
        measured = dense.isfinite()
        extra = torch.where(measured, step.deployed - dense, 0)
        kept = {
            "count": torch.ones_like(dense),
            "sparsity": step.sparsity,
            "own_sparsity": step.choice.float().mean((1, 2)),
            "lm_loss": step.lm_loss,
            "deployed": measured,
            "extra": extra,
            "squares": extra.square(),
            "dense": torch.where(measured, dense, 0),
        }
        of = tasks.cpu()
        self._step.index_add_(1, of, torch.stack([kept[name].double() for name in SUMS]).cpu())
        self._step_routes.index_add_(0, of, step.choice.flatten(1).double().cpu())

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The sums of the step, fp64 ``[T]`` by the names of :data:`SUMS`, on the device that ``reduce`` gives them on;
        what is added next belongs to another step.

        Args:
            reduce: adds up the fp64 tensors of all processes.
        """
        flat = reduce(torch.cat([self._step.flatten(), self._step_routes.flatten()]))
        self._step.zero_()
        self._step_routes.zero_()
        sums, routes = flat.split([self._step.numel(), self._step_routes.numel()])
        step = sums.view_as(self._step)
        self._since_log += step.cpu()
        self.recent.note(step.cpu())
        self.routes.note(step[0].cpu(), routes.view_as(self._step_routes).cpu())
        return dict(zip(SUMS, step, strict=True))

    def since_log(self) -> Tensor:
        """The sums since this was last asked, fp64 ``[SUMS, T]``."""
        sums = self._since_log.clone()
        self._since_log.zero_()
        return sums

    def figures(self, of: Tensor, multipliers: Multipliers | Price) -> dict[str, float]:
        """The figures that are logged, of these sums (:data:`SUMS`), fp64 ``[SUMS, T]``."""
        sums, figures = dict(zip(SUMS, of, strict=True)), {}
        if self.routes.count:
            figures = {
                "sparsity": self.routes.sparsity,
                "routes_vary": self.routes.vary,
                "routes_tell_task": self.routes.tell_task,
            }
        if isinstance(multipliers, Price):
            figures |= multipliers.figures()
            if deployed := float(sums["deployed"].sum()):
                figures["extra_loss"] = float(sums["extra"].sum()) / deployed
                figures["dense_loss"] = float(sums["dense"].sum()) / deployed
        for i, task in enumerate(self.tasks):
            if count := float(sums["count"][i]):
                figures[f"{task}/sparsity"] = float(sums["sparsity"][i]) / count
                figures[f"{task}/lm_loss"] = float(sums["lm_loss"][i]) / count
            if deployed := float(sums["deployed"][i]):
                figures[f"{task}/extra_loss"] = float(sums["extra"][i]) / deployed
            if isinstance(multipliers, Multipliers):
                figures[f"{task}/target"] = float(multipliers.target[i])
                figures[f"{task}/lambda1"] = float(multipliers.lambda1[i])
                figures[f"{task}/lambda2"] = float(multipliers.lambda2[i])
        return figures

    def collapse(self) -> str | None:
        """What to do about routers that give all inputs the same routes; None where they do not, or may well.

        They may where everything is sparse within the budget, where there is one input, or too few were seen.
        """
        routes = self.routes
        if routes.count < routes.size or routes.vary > 0 or routes.sparsity == 1:
            return None
        return (
            f"the routers gave the latest {routes.count} sequences all the same routes, {routes.sparsity:.0%} sparse: "
            "they do not look at the input. Let them see it from the start (new routers, Recipe(whiten=48)), train for "
            "more steps, or with a larger budget if nothing is sparse; where all examples are alike, this may be right"
        )


class RecentSums:
    """The sums (:data:`SUMS`) of each task over the latest sequences.

    Args:
        tasks: how many there are.
        size: sequences, at least; whole steps are kept.
    """

    def __init__(self, tasks: int, size: int = 64) -> None:
        self.tasks, self.size = tasks, size
        self._steps: deque[Tensor] = deque()

    def clear(self) -> None:
        """Forgets all sums."""
        self._steps.clear()

    def note(self, sums: Tensor) -> None:
        """One step's sums, fp64 ``[SUMS, tasks]``."""
        self._steps.append(sums)
        while self.count - float(self._steps[0][0].sum()) >= self.size:
            self._steps.popleft()

    @property
    def count(self) -> int:
        """The sequences that are summed."""
        return int(sum(float(step[0].sum()) for step in self._steps))

    def sums(self) -> Tensor:
        """fp64 ``[SUMS, tasks]``."""
        return sum(self._steps, torch.zeros(len(SUMS), self.tasks, dtype=torch.float64))


class RouteWatch:
    """The routes of the latest sequences, counted per task and unit (a layer, or a KV head of one).

    Args:
        size: sequences, at least; whole steps are kept.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._steps: deque[tuple[Tensor, Tensor]] = deque()

    def clear(self) -> None:
        """Forgets all routes."""
        self._steps.clear()

    def note(self, count: Tensor, sparse: Tensor) -> None:
        """One step.

        Args:
            count: ``[T]``, its sequences of each task.
            sparse: ``[T, U]``, for how many of them each unit's own route is sparse.
        """
        self._steps.append((count, sparse))
        while self.count - int(self._steps[0][0].sum()) >= self.size:
            self._steps.popleft()

    @property
    def count(self) -> int:
        """The sequences that are looked at."""
        return sum(int(count.sum()) for count, _ in self._steps)

    def _share(self) -> Tensor:
        """``[U]``, the share of them for which each unit is sparse."""
        return sum((sparse for _, sparse in self._steps), torch.zeros(())).sum(0) / self.count

    @property
    def sparsity(self) -> float:
        """Share of sparse routes."""
        return float(self._share().mean())

    @property
    def vary(self) -> float:
        """Share of units that did not give all sequences the same route: 0 says that the input counts for nothing."""
        share = self._share()
        return float(((share > 0) & (share < 1)).double().mean())

    @property
    def tell_task(self) -> float:
        """Mutual information of a unit's route and the sequence's task in bits, in the mean over the units: 0 where
        routes say nothing of the task, 1 where each unit tells apart two halves of the tasks.

        What so few sequences show of tasks that routes say nothing of is taken off (Miller and Madow's correction).
        """
        count: Tensor = sum((count for count, _ in self._steps), torch.zeros(()))  # [T]
        sparse: Tensor = sum((sparse for _, sparse in self._steps), torch.zeros(()))  # [T, U]
        seen = count > 0
        of_task = (count[seen] / count.sum())[:, None]
        bits = _bits(self._share()) - (of_task * _bits(sparse[seen] / count[seen, None])).sum(0)
        chance = (int(seen.sum()) - 1) / (2 * self.count * math.log(2))
        return float((bits - chance).clamp(min=0).mean())


def _bits(p: Tensor) -> Tensor:
    """The entropy of a choice of which one side has the probability ``p``."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
