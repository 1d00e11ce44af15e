"""After training: the sparsest threshold of the routers at which a budget of quality is kept, as measured.

Training strives for a budget by a price that acts on a few dozen sequences at a time, and ends somewhere near it. What
decides how much is sparse is one number, the log-odds at which a router calls an input full. So this number alone is
chosen again afterwards, on sequences that training has not seen: for a handful of thresholds the losses under the
routers' own routes are measured against dense, with forward passes only, and the sparsest that keeps to the budget is
folded into the routers' last biases. Shapes and files stay the published ones.

The budget is one of the mean over the data, as in training, and is kept by what is measured plus a margin of standard
errors: a mean that just meets it would exceed it, on other inputs, in half of all cases.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..models import patching
from ..models.patching import evaluation_mode
from ..operators import decide
from ..routers.modules import Router
from ..sequence_parallel import SequenceGroup
from .backbone import answered, losses
from .budget import SATURATED
from .config import Recipe
from .data import HELD_OUT, TOO_SHORT, PaddedCollator, nothing_hidden
from .objective import Policy, full_route, log_odds

MARGIN = 1.0
FEW = 16
"""Sequences below which a standard error is hardly known itself."""
TRIES = 9


@dataclass(frozen=True)
class Lost:
    """What the sequences of one task, or of all tasks that share a budget, lose against dense."""

    sequences: int
    sparsity: float
    """Mean share of sparse attention."""
    extra: float
    """Mean loss above dense, nats per answer token."""
    error: float
    """Standard error of that mean; NaN for one sequence."""
    dense: float
    """Mean dense loss."""
    budget: float
    """What may be lost, nats per answer token."""

    def most(self, margin: float) -> float:
        """The loss that is to be reckoned with: ``margin`` standard errors above the mean."""
        return self.extra + (0.0 if math.isnan(self.error) else margin * self.error)


@dataclass(frozen=True)
class OperatingPoint:
    """What the routers give at one threshold."""

    shift: float
    """Added to the log-odds of full attention."""
    sparsity: float
    """Mean over all sequences."""
    budgets: Mapping[str, Lost]
    """By budget: ``""`` for the common one, a task's name for its own."""
    tasks: Mapping[str, Lost]

    def keeps(self, margin: float) -> bool:
        """Whether every budget is kept."""
        return all(lost.most(margin) <= lost.budget for lost in self.budgets.values())


@dataclass(frozen=True)
class Calibration:
    """The threshold that was chosen, and what was measured on the way: a frontier of these routers.

    ``str()`` of it is a table.

    Attributes:
        chosen: the point of the threshold that the routers have now.
        tried: every point that was measured, by sparsity; ``chosen`` is among them. The first one is all full, whose
            loss is dense by definition.
        margin: standard errors that were added to the extra loss before it was compared with the budget.
        notes: what the user should know.
    """

    chosen: OperatingPoint
    tried: tuple[OperatingPoint, ...]
    margin: float
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        first = next(iter(self.chosen.tasks.values()))
        count = sum(lost.sequences for lost in self.chosen.tasks.values())
        lines = [
            f"{'sparsity':>10} {'extra loss':>20} {'budget':>8}   of {count} sequences, nats per answer token "
            f"(dense: {first.dense if len(self.chosen.tasks) == 1 else self._dense():.4f})"
        ]
        for point in self.tried:
            for name, lost in point.budgets.items():
                mark = "  <- taken" if point is self.chosen else ""
                lines.append(
                    f"{lost.sparsity:>10.3f} {lost.extra:>+10.4f} +- {lost.error:<6.4f} {lost.budget:>8.4f}"
                    f"{f'  {name}' if name else ''}{mark}"
                )
        if len(self.chosen.tasks) > 1:
            lines.append("where it was taken, of each task")
            for task, lost in self.chosen.tasks.items():
                lines.append(f"{lost.sparsity:>10.3f} {lost.extra:>+10.4f} +- {lost.error:<6.4f} {'':>8}  {task}")
        lines.append(f"log-odds of full attention shifted by {self.chosen.shift:+.3f}")
        return "\n".join([*lines, *self.notes])

    def _dense(self) -> float:
        parts = self.chosen.tasks.values()
        return sum(lost.dense * lost.sequences for lost in parts) / sum(lost.sequences for lost in parts)

    def record(self) -> str:
        """In one line, for a model card."""
        parts = [
            f"{lost.extra:+.4f} +- {lost.error:.4f} nats lost of {lost.budget:.4f}{f' ({name})' if name else ''}"
            for name, lost in self.chosen.budgets.items()
        ]
        return (
            f"Calibrated on {sum(lost.sequences for lost in self.chosen.tasks.values())} sequences: sparsity "
            f"{self.chosen.sparsity:.3f}, {', '.join(parts)}; log-odds shifted by {self.chosen.shift:+.3f}."
        )


@dataclass(frozen=True)
class Shared:
    """How processes share the sequences that are measured: each stream, a process or a group of them, has its own.

    Args:
        stream, streams: which is this process's, and of how many.
        group: the processes that share each sequence of the stream; None: this one alone.
    """

    stream: int = 0
    streams: int = 1
    group: SequenceGroup | None = None

    def rows(self, count: int) -> list[int]:
        """This stream's of so many sequences; all streams get equally many, so the last ones may be done twice."""
        each = -(-count // self.streams)
        return [(self.stream + i * self.streams) % count for i in range(each)]

    def gather(self, x: Tensor, count: int) -> Tensor:
        """What all streams have found, ``[count, ...]`` on the CPU in the order of the sequences, the same bits in
        every process."""
        if self.streams == 1:
            return x.cpu()[:count]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        size = len(parts) // self.streams
        return torch.stack(parts[::size], 1).flatten(0, 1).cpu()[:count]


def calibrate(
    model: nn.Module, data: Any, recipe: Recipe, *, margin: float = MARGIN, tries: int = TRIES, **options: Any
) -> Calibration:
    """Shifts the log-odds of all routers by one number, so that they are as sparse as the budget allows.

    A task with a budget of its own must keep to that as well: the strictest decides. Everything full loses nothing, so
    there is always a threshold; where no other keeps to the budget it is that one. Routers are changed last, and are as
    they were after an error.

    Args:
        model: a patched causal language model.
        data: a :class:`~.data.RouterDataset`, best of sequences that training has not seen.
        recipe: its budgets count.
        margin: standard errors by which the measured mean loss must stay below the budget; 0: the mean itself.
        tries: thresholds that are measured, at least 1.
        options: of :class:`Calibrator`.

    Raises:
        TypeError: the data do not name their tasks.
        ValueError: the recipe has targets, an argument breaks its rule, the data have no example or a budget names a
            task that they lack, or a loss is not finite.
    """
    check(recipe, margin, tries, tasks_of(data))
    calibrator = Calibrator(model, data, **options)
    found = calibrator.find(recipe, margin=margin, tries=tries)
    calibrator.shift(found.chosen.shift)
    return found


def tasks_of(data: Any) -> tuple[str, ...]:
    """The tasks' names; TypeError where the data do not say them."""
    if not getattr(data, "tasks", None):
        raise TypeError(f"data must have tasks, like a RouterDataset, got {type(data).__name__}")
    return tuple(data.tasks)


def check(recipe: Recipe, margin: float, tries: int, tasks: Sequence[str]) -> None:
    """ValueError where :meth:`Calibrator.find` cannot work with these."""
    if not recipe.has_budget:
        raise ValueError("recipe must have a budget to calibrate to, it has target sparsities")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be >= 0 and finite, got {margin}")
    if not isinstance(tries, int) or tries < 1:
        raise ValueError(f"tries must be >= 1 and whole, got {tries!r}")
    recipe.check_tasks(tasks)


class Calibrator:
    """What routers lose at several thresholds, measured when it is asked for: for one budget, or for several.

    Everything full is measured when it is made. The routers must stay as they are for as long as it is used.

    Args:
        model: a patched causal language model.
        data: a :class:`~.data.RouterDataset`.
        collator: makes batches of the data's rows (default: padded).
        batch_size: sequences at a time, on each process.
        device: of the model; default: of its parameters.
        shared: how processes share the work; every one of them must do the same, and gets the same result.
        progress: show a bar.

    Raises:
        TypeError: the data do not name their tasks.
        ValueError: the data have no example, one without an answer token, or none that is longer than sink and window;
            ``batch_size`` breaks its rule; a router has no last bias that could be shifted; or a loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        collator: Any = None,
        batch_size: int = 4,
        device: torch.device | str | None = None,
        shared: Shared | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be >= 1 and whole, got {batch_size!r}")
        self.names = tasks_of(data)
        if not len(data):
            raise ValueError("data must have at least one example")
        longest = nothing_hidden(data, patching.get_routers(model))
        if longest is not None:
            raise ValueError(f"data must tell sparse from full attention: {TOO_SHORT.format(longest)}")
        self._routers = [cast(Router, router) for router in patching.get_routers(model).layers]
        for place, router in enumerate(self._routers):
            if not router.is_plain():
                raise ValueError(f"the router of layer {place} was replaced or hooked: its last bias cannot be shifted")
        self._progress = progress
        self._measure = _Measure(model, data, collator or PaddedCollator(), batch_size, device, shared or Shared())
        with self._bar(1) as bar:
            self._dense, _, odds = self._measure.run(full_route, bar)
        self._values = odds[odds.isfinite()].double().unique()  # [m], ascending
        now = int((self._values <= 0).sum())
        self._now = now if now < len(self._values) else 0
        """How many are sparse without a shift, where not all are; 0: there is no such threshold to begin with."""
        self._known: dict[int, _Losses] = {}
        """By how many of the log-odds are sparse."""

    def find(self, recipe: Recipe, *, margin: float = MARGIN, tries: int = TRIES) -> Calibration:
        """The sparsest threshold that keeps to the recipe's budget; arguments and errors as for :func:`calibrate`. The
        routers stay as they are. What was measured for an earlier budget is not measured again."""
        check(recipe, margin, tries, self.names)
        zero = torch.zeros_like(self._dense)
        points = {0: self._point(_Losses(self._shift_of(0), zero, zero), recipe)}
        kept, lost = 0, len(self._values) + 1  # so many sparse keep to the budget, so many do not
        for sparse, losses_there in sorted(self._known.items()):
            points[sparse] = self._point(losses_there, recipe)
            if points[sparse].keeps(margin):
                kept = max(kept, sparse)
        lost = min((n for n in points if n > kept), default=lost)
        sparse = (kept + lost) // 2 if self._known or not self._now else self._now
        with self._bar(tries) as bar:
            for _ in range(tries):
                if lost - kept <= 1:
                    break
                shift = self._shift_of(sparse)
                with _shifted(self._routers, shift):
                    routed, share, _ = self._measure.run(_own, bar)
                self._known[sparse] = _Losses(shift, routed - self._dense, share)
                points[sparse] = self._point(self._known[sparse], recipe)
                if points[sparse].keeps(margin):
                    kept = max(kept, sparse)
                else:
                    lost = sparse
                sparse = (kept + lost) // 2
        found = sorted(points.values(), key=lambda p: p.sparsity)
        chosen = max((p for p in found if p.keeps(margin)), key=lambda p: p.sparsity, default=points[0])
        return Calibration(chosen, tuple(found), margin, tuple(_notes(chosen, margin, recipe)))

    def shift(self, log_odds: float) -> None:
        """Folds a shift into the routers: for good, so this is the last that is done here."""
        _shift(self._routers, log_odds)

    def _shift_of(self, sparse: int) -> float:
        """That which makes the so many smallest of the log-odds sparse: halfway to the next one, beyond the ends as far
        as all of them spread."""
        values = self._values
        if not len(values) or (sparse and sparse == self._now):
            return 0.0
        span = max(1.0, float(values[-1] - values[0]))
        if sparse == 0:
            return span - float(values[0])
        if sparse == len(values):
            return -span - float(values[-1])
        return -float(values[sparse - 1] + values[sparse]) / 2

    def _point(self, found: _Losses, recipe: Recipe) -> OperatingPoint:
        return _point(found.shift, found.extra, self._dense, found.share, self._measure.tasks, self.names, recipe)

    @contextlib.contextmanager
    def _bar(self, runs: int) -> Iterator[Any]:
        total = runs * self._measure.batches
        with evaluation_mode(self._measure.model), tqdm(
            total=total, desc="calibrating", unit="batch", disable=not self._progress
        ) as bar:  # fmt: skip
            yield bar


@dataclass(frozen=True)
class _Losses:
    """What was measured at one threshold."""

    shift: float
    extra: Tensor
    """``[N]``, the sequences' losses above dense."""
    share: Tensor
    """``[N]``, of sparse attention."""


class _Measure:
    """Losses and routes of all sequences under a policy."""

    def __init__(
        self, model: nn.Module, data: Any, collator: Any, batch_size: int, device: Any, shared: Shared
    ) -> None:
        self.model, self.shared, self.count = model, shared, len(data)
        place = torch.device(device) if device is not None else next(model.parameters()).device
        rows = [data[i] for i in shared.rows(self.count)]
        self._batches = []
        for first in range(0, len(rows), batch_size):
            batch = collator(rows[first : first + batch_size])
            batch = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in batch.items()}
            if len(answered(batch)["task_ids"]) < len(batch["task_ids"]):
                raise ValueError("data must have an answer token in every example, one has none")
            self._batches.append(batch)
        self.batches = len(self._batches)
        self.tasks = shared.gather(torch.cat([batch["task_ids"] for batch in self._batches]), self.count)

    @torch.no_grad()
    def run(self, policy: Policy, bar: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Losses ``[N]``, the share of sparse attention ``[N]`` and log-odds ``[N, U]``, on the CPU in fp64."""
        found: list[Tensor] = []
        for batch in self._batches:
            seen: dict[int, tuple[Tensor, Tensor]] = {}

            def watched(layer: int, logits: Tensor, seen: dict[int, tuple[Tensor, Tensor]] = seen) -> Tensor:
                route = policy(layer, logits)
                seen[layer] = log_odds(logits).flatten(1) if logits.dim() == 3 else log_odds(logits)[:, None], route
                return route

            with patching.policy(patching.unwrap_parallel(self.model), watched):
                loss = losses(self.model, batch, self.shared.group)
            odds = torch.cat([seen[layer][0] for layer in sorted(seen)], 1)
            sparse = torch.cat([seen[layer][1].reshape(len(loss), -1) for layer in sorted(seen)], 1).float().mean(1)
            found.append(torch.cat([loss.float()[:, None], sparse[:, None], odds.float()], 1))
            bar.update()
        table = self.shared.gather(torch.cat(found), self.count).double()
        if not bool(table[:, 0].isfinite().all()):
            bad = (~table[:, 0].isfinite()).nonzero()[:, 0].tolist()
            raise ValueError(f"the losses must be finite, those of examples {bad[:8]} are not")
        return table[:, 0], table[:, 1], table[:, 2:]


def _own(layer: int, logits: Tensor) -> Tensor:
    """The routers' own choice, as in use."""
    return decide(logits)


def _point(
    shift: float,
    extra: Tensor,
    dense: Tensor,
    sparse: Tensor,
    tasks: Tensor,
    names: Sequence[str],
    recipe: Recipe,
) -> OperatingPoint:
    own = [names.index(task) for task in sorted(recipe.budgets)]
    common = torch.tensor([i not in own for i in tasks.tolist()])

    def lost(rows: Tensor, budget: float) -> Lost:
        n = int(rows.sum())
        error = float(extra[rows].std() / math.sqrt(n)) if n > 1 else math.nan
        return Lost(n, float(sparse[rows].mean()), float(extra[rows].mean()), error, float(dense[rows].mean()), budget)

    def nats(rows: Tensor, amount: float) -> float:
        return amount * max(SATURATED, float(dense[rows].mean())) if recipe.budget_unit == "share" else amount

    budgets: dict[str, Lost] = {}
    of_task: dict[str, Lost] = {}
    if bool(common.any()):
        budgets[""] = lost(common, nats(common, recipe.quality_budget))
    for place, task in enumerate(names):
        rows = tasks == place
        if not bool(rows.any()):
            continue
        if place in own:
            budgets[task] = lost(rows, nats(rows, recipe.budgets[task]))
        of_task[task] = lost(rows, (budgets[task] if place in own else budgets[""]).budget)
    return OperatingPoint(shift, float(sparse.mean()), budgets, of_task)


def _notes(chosen: OperatingPoint, margin: float, recipe: Recipe) -> Iterator[str]:
    if margin and any(math.isnan(lost.error) for lost in chosen.budgets.values()):
        yield "one sequence says nothing of its standard error: the budget is kept by its own loss, without a margin"
    if missing := sorted(set(recipe.budgets) - set(chosen.budgets)):
        yield f"no sequence of {', '.join(missing)} was measured, so the budget of its own was not looked at"
    if (count := sum(lost.sequences for lost in chosen.tasks.values())) < FEW:
        yield f"{count} sequences are few: what they lose says little of others (some {HELD_OUT} are enough)"
    uncertain = [
        f"{name or 'all'} ({lost.sequences} sequences, {lost.extra:+.4f} +- {lost.error:.4f})"
        for name, lost in chosen.budgets.items()
        if chosen.sparsity < 1 and lost.most(margin) - lost.extra > lost.budget / 2
    ]
    if uncertain:
        yield (
            f"the margin alone takes more than half of the budget of {', '.join(uncertain)}: measured on more "
            "sequences, more may be sparse"
        )
    if chosen.sparsity == 1:
        yield "all is sparse, for every input that was measured"
    if chosen.sparsity == 0:
        yield "no threshold that was tried keeps to the budget with anything sparse: all is full"
    # Two standard errors: of ten tasks, chance rarely takes one so far.
    over = [
        f"{task} ({lost.extra:+.4f} +- {lost.error:.4f})"
        for task, lost in chosen.tasks.items()
        if task not in chosen.budgets and lost.sequences > 1 and lost.extra - 2 * lost.error > lost.budget
    ]
    if over:
        yield (
            f"the budget is kept in the mean over the data, but exceeded in {', '.join(over)}: what other tasks gain "
            "pays for it; where that is not wanted, give these tasks budgets of their own"
        )


@torch.no_grad()
def _shift(routers: Sequence[Router], shift: float) -> None:
    for router in routers:
        router.last_bias[1] += shift


@contextlib.contextmanager
def _shifted(routers: Sequence[Router], shift: float) -> Iterator[None]:
    """Within the ``with`` block the routers are what they would be, rounding of the bias included."""
    before = [router.last_bias.detach().clone() for router in routers]
    _shift(routers, shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for router, bias in zip(routers, before, strict=True):
                router.last_bias.copy_(bias)
