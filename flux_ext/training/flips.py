"""Which layers a step flips: those more often whose flips change the loss more, for what they say varies more."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlipChances(nn.Module):
    """How likely each layer is flipped in a sequence, from what its flips have changed of late.

    A flip that is weighed by one over its chance counts right in the mean, whatever the chances. The gradient's
    variance is least where they are proportional to the root mean square of the worth. All start alike; a part of the
    flips, ``EVEN``, stays spread evenly, so that what was worth nothing may turn out to be worth something.

    Args:
        num_layers: routed layers, L.
        flips: of each sequence, K.
    """

    EVEN = 0.3
    MEMORY = 128.0
    """Flips of a layer after which earlier ones count for 1 / e."""
    SEEN = 4.0
    """Flips of every layer before the chances differ."""

    count: Tensor
    square: Tensor

    def __init__(self, num_layers: int, flips: int) -> None:
        super().__init__()
        self.num_layers, self.flips = num_layers, flips
        self.register_buffer("count", torch.zeros(num_layers))
        self.register_buffer("square", torch.zeros(num_layers))

    def chances(self) -> Tensor:
        """Of each layer to be among a sequence's flips, ``[L]`` on the CPU, at most 1, in sum K."""
        count, square = self.count.cpu(), self.square.cpu()
        even = torch.full((self.num_layers,), self.flips / self.num_layers)
        if bool((count < self.SEEN).any()) or not float(square.sum()):
            return even
        size = (square / count).sqrt()
        chances = (1 - self.EVEN) * self.flips * size / size.sum() + self.EVEN * even
        for _ in range(self.num_layers):  # what is above 1 goes to the others
            certain = chances >= 1
            if not bool(certain.any()) or bool(certain.all()):
                break
            rest = self.flips - int(certain.sum())
            chances = torch.where(certain, 1.0, chances * rest / chances[~certain].sum())
            if bool((chances <= 1).all()):
                break
        return chances.clamp(max=1)

    def draw(self, chances: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        """The layers to flip, int64 ``[batch, K]`` on the CPU, different ones in each row; each layer in about
        ``batch`` times its chance of the rows."""
        order = torch.randperm(self.num_layers, generator=generator)
        ends = chances[order].double().cumsum(0)
        ends = ends * (self.flips / ends[-1])
        start = torch.rand((), generator=generator, dtype=torch.float64)
        start = (start + torch.randperm(batch, generator=generator) / batch).remainder(1)
        points = start[:, None] + torch.arange(self.flips)  # K of them, 1 apart: no two in a layer's span
        places = torch.searchsorted(ends, points, right=True).clamp(max=self.num_layers - 1)
        return order[places]

    @torch.no_grad()
    def note(self, layer: int, worth: Tensor) -> None:
        """What flips of a layer have changed, ``[R]`` in nats."""
        keep = torch.exp(torch.tensor(-len(worth) / self.MEMORY))
        self.count[layer] = self.count[layer] * keep + len(worth)
        self.square[layer] = self.square[layer] * keep + worth.square().sum()
