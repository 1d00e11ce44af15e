"""What the latest sequences of a training gave: whether routers look at their input, and sums of each task."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

SUMS = ("count", "sparsity", "own_sparsity", "lm_loss", "deployed", "extra", "dense")
"""What is summed over the sequences of each task; the last three over those that ran under the routers' own routes."""


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
    """The routes of the latest sequences, counted per unit (a layer, or a KV head of one).

    Args:
        size: sequences, at least; whole steps are kept.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._steps: deque[tuple[int, Tensor]] = deque()

    def clear(self) -> None:
        """Forgets all routes."""
        self._steps.clear()

    def note(self, count: int, sparse: Tensor) -> None:
        """One step.

        Args:
            count: its sequences.
            sparse: ``[U]``, for how many of them each unit's own route is sparse.
        """
        self._steps.append((count, sparse))
        while self.count - self._steps[0][0] >= self.size:
            self._steps.popleft()

    @property
    def count(self) -> int:
        """The sequences that are looked at."""
        return sum(count for count, _ in self._steps)

    def _sparse(self) -> Tensor:
        """``[U]``, the share of them for which each unit is sparse."""
        total = sum((sparse for _, sparse in list(self._steps)[1:]), self._steps[0][1])
        return total / self.count

    @property
    def sparsity(self) -> float:
        """Share of sparse routes."""
        return float(self._sparse().mean())

    @property
    def vary(self) -> float:
        """Share of units that did not give all sequences the same route: 0 says that the input counts for nothing."""
        share = self._sparse()
        return float(((share > 0) & (share < 1)).double().mean())
