"""What ``flux_ext.attention`` and its twin do alike around ``attend``: a fractional route is two hard calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operands import KeyValues, Routing
from .patterns import Full

Attend = Callable[..., tuple[Tensor, Tensor]]
"""``operators.attend`` or its twin: ``(q, kv, routing, scale, q_begin, q_end) -> (out, lse)``."""
MixingWeight = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""``(route, q, cu_seqlens)``: a fractional route as a factor that broadcasts over the output."""

_FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_fraction(route: Tensor, return_lse: bool) -> None:
    """ValueError where a floating-point route has another shape or dtype, or ``return_lse`` meets one."""
    if route.dim() not in (1, 2):
        raise ValueError(f"route must be [B] or [B, Hkv], got shape {list(route.shape)}")
    if route.dtype not in _FRACTIONS or route.layout is not torch.strided:
        kind = route.dtype if route.layout is torch.strided else route.layout
        raise ValueError(f"a fractional route must be dense float16, bfloat16, float32 or float64, got {kind}")
    if return_lse:
        raise ValueError("return_lse needs a hard route: a mixture has no log-sum-exp")


def attend_or_mix(
    attend: Attend,
    mixing_weight: MixingWeight,
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float | None,
    q_begin: Tensor | None,
    q_end: Tensor | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(1 - w) * full + w * sparse`` where the route is a weight ``w``, one call by it where it is a choice.

    Arguments as for :func:`flux_ext.attention`. Autograd makes the gradient of a mixture, that of ``w`` included.

    Raises:
        ValueError: a fractional route has another shape or dtype, or ``return_lse`` meets one.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    route, full, sparse = routing
    if route is None or not route.is_floating_point():
        out, lse = attend(q, kv, routing, scale, q_begin, q_end)
        return (out, lse) if return_lse else out
    check_fraction(route, return_lse)
    choice = torch.zeros(route.shape, dtype=torch.int32, device=q.device)
    # In each call, in place of the pattern that no route chooses, the one that costs nothing to choose blocks for.
    all_full, _ = attend(q, kv, Routing(choice, full, Full()), scale, q_begin, q_end)
    w = mixing_weight(route, q, cu_seqlens)  # after attend, which checks the shape of the route
    all_sparse, _ = attend(q, kv, Routing(choice + 1, Full(), sparse), scale, q_begin, q_end)
    return (1 - w) * all_full + w * all_sparse
