"""Training in several processes: what they agree on, and the routers beside a backbone that is cut up (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Agree = Callable[[int], int]
"""The largest of the processes' numbers; each of them must ask."""


def alone(number: int) -> int:
    """What one process agrees on with itself."""
    return number


def most(device: torch.device) -> Agree:
    """The largest of all processes' numbers, told over a ``device``."""

    def agree(number: int) -> int:
        x = torch.tensor(number, device=device)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return int(x)

    return agree


def keep_whole(accelerator: Any, routers: nn.Module) -> None:
    """Tells accelerate's FSDP2 to cut up the backbone alone: every process keeps all routers.

    They are small, their gradients do not come through the backbone's modules (FSDP reduces those that do), and so
    a checkpoint is that of one process.

    Raises:
        ValueError: FSDP is of the first version, or loads the weights on one process only.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f'fsdp_config["version"] must be 2 (fully_shard), got {plugin.fsdp_version}: FSDP 1 flattens weights that '
            "learn and weights that do not into one"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading must be False: a model is patched, and proven, before it is cut up, so every "
            "process must have its weights"
        )
    plugin.ignored_modules = [routers]
    routers.to(accelerator.device)


@torch.no_grad()
def spread(routers: nn.Module) -> None:
    """Gives all processes the first one's routers."""
    for x in (*routers.parameters(), *routers.buffers()):
        dist.broadcast(x, 0)


@torch.no_grad()
def average_gradients(routers: nn.Module) -> None:
    """Makes the routers' gradients the mean of all processes', as DDP does."""
    grads = [p.grad for p in routers.parameters() if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts: tuple[Tensor, ...] = flat.split([g.numel() for g in grads])
    for grad, mean in zip(grads, parts, strict=True):
        grad.copy_(mean.view_as(grad))
