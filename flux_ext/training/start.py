"""Where training starts: at which odds, and with routers that can tell one input from another.

Pooled queries of one layer are nearly the same vector for every prompt: what differs is a few percent of what does
not, and routers that start from torch's initialisation learn their biases and nothing else. So the pooled states of
a few dozen prompts are measured, and what centres and scales them is folded into the routers' first layers. The
architecture and the file format stay the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models import patching
from ..routers.modules import FULL_BIAS, Router
from ..sequence_parallel import SequenceGroup
from ..transformers_seam import KEEP_LOGITS
from .backbone import run

FLOOR = 1e-4
"""Deviations below this share of the largest state are rounding, not information."""


@torch.no_grad()
def start_at(router: Router, log_odds: float) -> None:
    """Lets a router start at these log-odds of full attention if it is still as it was made.

    That is told by the last bias, (0, :data:`~flux_ext.routers.modules.FULL_BIAS`): any step of an optimiser, a start
    that was set before, and the weights of a file that somebody has trained have another.
    """
    if router.last_bias.tolist() == [0.0, FULL_BIAS]:
        router.last_bias[1] = log_odds


def is_new(router: Router) -> bool:
    """Whether a router was neither trained (any step moves the first of its last biases from 0) nor whitened.

    Its start may have been set (:func:`start_at`): that is the other of the two biases.
    """
    return float(router.last_bias[0].detach()) == 0 and not router.is_whitened


def check_pooled(pooled: Tensor) -> None:
    """ValueError where pooled states ``[N, ...]`` cannot be measured: fewer than two, or not finite."""
    if len(pooled) < 2:
        raise ValueError(f"pooled must be of at least 2 prompts, got {len(pooled)}")
    if not bool(pooled.isfinite().all()):
        raise ValueError("pooled has values that are not finite")


@torch.no_grad()
def pooled_states(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], group: SequenceGroup | None = None
) -> list[Tensor]:
    """What each router sees of each prompt, with every layer full.

    Args:
        model: a patched model.
        batches: of :class:`~.data.PaddedCollator` or :class:`~.data.PackedCollator`, on the model's device.
        group: the processes that share the sequences, with the same batches; None: this one alone.

    Returns:
        one fp32 tensor per routed layer, ``[N, D]``, of head routers ``[N, Hkv, D]``, for the N prompts.
    """
    routers = patching.get_routers(model).layers
    seen: list[list[Tensor]] = [[] for _ in routers]

    def watch(place: int) -> Callable[[Router, tuple[Any, ...]], None]:
        def before(router: Router, args: tuple[Any, ...]) -> None:
            x, begin, end = (*args, None, None)[:3]
            weights = [w.detach() for w in router.weights()]
            pooled = torch.ops.flux_ext.route(x, weights, router.pool_size, router.per_head, begin, end)[0]
            seen[place].append(pooled.float())

        return before

    handles = [router.register_forward_pre_hook(watch(place)) for place, router in enumerate(routers)]
    try:
        with patching.routes(model, "full"):
            for batch in batches:
                run(model, batch, group, **{KEEP_LOGITS: 1})
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(states) for states in seen]


@torch.no_grad()
def whiten(router: Router, pooled: Tensor) -> None:
    """Folds the measured mean and spread of the pooled states into the router's first layer.

    Layer routers: with mean ``m`` and deviation ``s`` over the prompts, of each dimension, the first layer then
    computes ``W ((x - m) / s) + b``.

    Head routers share their weights, and their states differ far more from head to head than from prompt to prompt.
    There ``s`` is the deviation over the prompts of one head, averaged over the heads, and along the directions in
    which the heads' own means differ the states are shrunk until that difference, too, has a deviation of one: so
    heads stay apart, and do not drown what prompts say.

    Args:
        router: of one layer.
        pooled: ``[N, D]``, of head routers ``[N, H, D]``, finite; N at least 2.

    Raises:
        ValueError: fewer than two prompts, another width than the router's, or a value that is not finite.
    """
    first = cast(nn.Linear, router.encoder[0])
    check_pooled(pooled)
    if pooled.shape[-1] != first.in_features:
        raise ValueError(f"pooled must be [..., {first.in_features}], got {list(pooled.shape)}")
    pooled = pooled.to(first.weight.device, torch.float64)
    if pooled.dim() == 2:
        pooled = pooled[:, None]
    heads = pooled.mean(0)  # [H, D]
    mean = heads.mean(0)
    deviation = (pooled - heads).square().sum(0).mean(0).div(len(pooled) - 1).sqrt()
    deviation = deviation.clamp(min=max(FLOOR * float(pooled.abs().max()), torch.finfo(torch.float32).tiny))
    fold = torch.diag(1 / deviation)  # [D, D]: the router shall see fold (x - mean)
    if len(heads) > 1:
        _, spread, directions = torch.linalg.svd((heads - mean) / deviation, full_matrices=False)  # [k], [k, D]
        shrunk = 1 - (1 + spread.square() / (len(heads) - 1)).rsqrt()
        fold = fold - directions.T @ torch.diag(shrunk) @ directions @ fold
    weight = first.weight.double() @ fold
    first.bias.sub_((weight @ mean).to(first.bias.dtype))
    first.weight.copy_(weight)
    router.is_whitened = True
