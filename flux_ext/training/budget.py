"""How much quality may be lost: one price of sparsity for all inputs, found while the routers learn.

The price (nats per unit of sparsity) is the dual variable of ``mean(routed loss - dense loss) <= budget``: it rises
while less is lost than may be, and falls while more is. What counts is the loss under the routes that are used
afterwards, the routers' own choices, not under those that training draws to explore.

The dense loss is that of every route full, so of the full mode: where ``FluxConfig.full`` is not ``"full"``, what that
mode loses against full attention is in none of these figures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .config import Recipe
from .distributed import Agree, alone

SATURATED = 0.1
"""Nats per answer token: a smaller mean dense loss counts as this, for a share of it would be next to nothing."""


class Price(nn.Module):
    """The price of each task: one that all tasks share, and one more for each task with a budget of its own.

    The controller works on the logarithm of ``price / budget``, so that it needs no scale of the losses. Its error is
    what is left of the budget, in budgets: 1 while nothing is lost, 0 at the budget, at least ``-WORST``. It counts by
    how certain it is: the mean of so few sequences has a standard error of about a budget, and a controller that takes
    that for news lets the price swing. So the error is divided by ``1 + (standard error / budget)^2``.

    The integral part, ``ratio``, moves by ``exp(RATE * error)`` per step; the proportional part multiplies it by
    ``exp(GAIN * error)``: routers follow the price with a delay of tens of steps, in which an integral alone would buy
    far too much. The ratio starts at ``START`` (where the loss is convex in the sparsity, the right one is at least 1,
    for the whole of the sparsity costs the budget), and the price stays below ``MOST`` budgets, lest it run away where
    nothing is left to buy.

    What is lost is a mean over the latest sequences, :data:`SEQUENCES` or :data:`STEPS` steps of them, whichever is
    more. All state is the same in all processes.

    Args:
        tasks: the tasks' names; T of them.
        recipe: the budgets; see :class:`~.config.Recipe`.
    """

    RATE, GAIN = 0.01, 1.0
    START, LEAST, MOST = 4.0, 0.1, 30.0
    WORST = 1.5
    SEQUENCES, STEPS = 64, 10

    ratio: Tensor
    recent: Tensor
    dense: Tensor
    group: Tensor
    limit: Tensor

    def __init__(self, tasks: Sequence[str], recipe: Recipe) -> None:
        super().__init__()
        self.tasks, self.share = tuple(tasks), recipe.budget_unit == "share"
        own = [t for t in self.tasks if t in recipe.budgets]
        group = [1 + own.index(t) if t in own else 0 for t in self.tasks]
        limits = [recipe.quality_budget, *(recipe.budgets[t] for t in own)]
        groups = len(limits)
        self.register_buffer("ratio", torch.full((groups,), self.START))
        # Sequences, the nats that they lost, and the squares of these.
        self.register_buffer("recent", torch.zeros(3, groups, dtype=torch.float64))
        self.register_buffer("dense", torch.zeros(2, groups, dtype=torch.float64))  # all sequences, and their loss
        self.register_buffer("group", torch.tensor(group), persistent=False)
        self.register_buffer("limit", torch.tensor(limits), persistent=False)

    def budgets(self) -> Tensor:
        """Nats per answer token that may be lost, ``[T]``; 0 where it is a share of losses that nobody has seen."""
        return self._budgets()[self.group]

    def prices(self) -> Tensor:
        """Nats per unit of sparsity, ``[T]``."""
        budget = self._budgets()
        ratio = self.ratio * torch.exp(self.GAIN * self._error(budget))
        return (ratio.clamp(max=self.MOST) * budget)[self.group]

    def extra(self) -> Tensor:
        """Nats per answer token that the routers' own routes have lost of late, ``[T]``; NaN before the first."""
        count, lost, _ = self.recent.float().unbind()
        return (lost / count)[self.group]

    def _error(self, budget: Tensor) -> Tensor:
        """What is left, in budgets, as far as it is certain; 1 before anything was measured, and where there is no
        budget to be left."""
        count, lost, squares = self.recent.unbind()
        left = (1 - lost / count / budget).nan_to_num(1.0, 1.0, 1.0).clamp(-self.WORST, 1)
        noise = (squares / count - (lost / count).square()).clamp(min=0) / count / budget.square()
        return (left / (1 + noise.nan_to_num(0.0, 0.0, 0.0))).float()

    def figures(self) -> dict[str, float]:
        """For the log: the common price and budget, and those of tasks with their own."""
        price, budget = self.prices().tolist(), self.budgets().tolist()
        figures: dict[str, float] = {}
        for i, task in enumerate(self.tasks):
            prefix = "" if self.group[i] == 0 else f"{task}/"
            figures |= {f"{prefix}price": price[i], f"{prefix}budget": budget[i]}
        return figures

    def _budgets(self) -> Tensor:
        if not self.share:
            return self.limit
        count, total = self.dense.unbind()
        return self.limit * (total / count).clamp(min=SATURATED).nan_to_num(0.0).float()

    def penalty(self, sparsity: Tensor, tasks: Tensor) -> Tensor:
        """What the full attention of the sequences costs, a mean in nats.

        Args:
            sparsity: ``[B]``, differentiable.
            tasks: int64 ``[B]``, the sequences' tasks.
        """
        return (self.prices()[tasks] * (1 - sparsity)).mean()

    @torch.no_grad()
    def ascend(self, count: Tensor, extra: Tensor, squares: Tensor, dense: Tensor) -> None:
        """One step of the controller.

        Args:
            count: ``[T]``, sequences of each task whose loss under the routers' own routes was measured in this step,
                on all ranks.
            extra, squares, dense: ``[T]``, the sums over them of the nats lost, of their squares, and of the dense
                loss.
        """
        n, lost, square, base = (
            torch.zeros_like(self.recent[0]).index_add(0, self.group, x.double())
            for x in (count, extra, squares, dense)
        )
        keep = torch.exp(-(n / self.SEQUENCES).clamp(max=1 / self.STEPS))
        self.recent = self.recent * keep + torch.stack([n, lost, square])
        self.dense = self.dense + torch.stack([n, base])
        moved = self.ratio * torch.exp(self.RATE * self._error(self._budgets()))
        self.ratio = torch.where(n > 0, moved.clamp(self.LEAST, self.MOST), self.ratio)


class DenseLosses:
    """The loss of each sequence with every route full, whatever the full mode is: measured when first asked for, and
    kept.

    Kept by a digest of the tokens and labels, which any collator, order of the examples, number of epochs and number of
    processes leaves as it is; examples that were changed are measured anew.
    """

    def __init__(self) -> None:
        self._known: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(
        self,
        inputs: Mapping[str, Any],
        rows: Tensor,
        measure: Callable[[Tensor], Tensor],
        agree: Agree = alone,
    ) -> Tensor:
        """The losses of some sequences, fp32 ``[len(rows)]`` on their device, nats per answer token.

        Args:
            inputs: a batch of :class:`~.data.PaddedCollator` or :class:`~.data.PackedCollator`.
            rows: int64, which sequences.
            measure: their losses ``[len(rows)]``, of those that are not known.
            agree: where all processes must measure together, some of them nothing.
        """
        all_keys = sequence_keys(inputs)
        keys = [all_keys[row] for row in rows.tolist()]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if agree(len(new)):
            found = measure(rows[torch.tensor(new, dtype=torch.long, device=rows.device)]).tolist()
            self._known |= {keys[i]: x for i, x in zip(new, found, strict=True)}
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float32, device=rows.device)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            "dense_keys": torch.tensor(list(self._known), dtype=torch.int64),
            "dense_losses": torch.tensor(list(self._known.values()), dtype=torch.float32),
        }

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds those of a checkpoint that has any.

        Raises:
            ValueError: they are not what :meth:`tensors` gives.
        """
        keys, values = tensors.get("dense_keys"), tensors.get("dense_losses")
        if keys is None and values is None:
            return
        if keys is None or values is None or keys.dim() != 1 or keys.shape != values.shape or keys.dtype != torch.int64:
            raise ValueError("dense_keys must be int64 [N] and dense_losses [N]")
        self._known |= dict(zip(keys.tolist(), values.tolist(), strict=True))


def sequence_keys(inputs: Mapping[str, Any]) -> list[int]:
    """A 64-bit digest of each sequence's tokens and labels, padding left out."""
    tokens, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    bounds, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if bounds is not None:
        ends = bounds.tolist()
        parts = [(tokens[0, a:b], labels[0, a:b]) for a, b in pairwise(ends)]
    elif mask is None:
        parts = list(zip(tokens, labels, strict=True))
    else:
        parts = [(t[m], y[m]) for t, y, m in zip(tokens, labels, mask.bool().cpu(), strict=True)]
    return [_digest(torch.stack(part)) for part in parts]


def _digest(x: Tensor) -> int:
    content = x.to(torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
