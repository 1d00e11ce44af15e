"""What ``flux_ext.attention`` and its twin do alike: by a route that is a choice they attend, by a weight they mix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operands import KeyValues, Routing
from .patterns import BlockSparse, Full, Pattern

Attend = Callable[..., tuple[Tensor, Tensor]]
"""``operators.attend`` or its twin: ``(q, kv, routing, scale, q_begin, q_end) -> (out, lse)``."""
Mix = Callable[..., Tensor]
"""``operators.mix`` or its twin: ``(q, kv, routing, scale, q_begin, q_end) -> out``."""

_FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_fraction(route: Tensor, return_lse: bool = False) -> None:
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
    mix: Mix,
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float | None,
    q_begin: Tensor | None,
    q_end: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(1 - w) * full + w * sparse`` where the route is a weight ``w``, attention by it where it is a choice.

    Arguments as for :func:`flux_ext.attention`.

    Raises:
        ValueError: a fractional route has another shape or dtype, or ``return_lse`` meets one.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    route = routing.route
    if route is None or not route.is_floating_point():
        out, lse = attend(q, kv, routing, scale, q_begin, q_end)
        return (out, lse) if return_lse else out
    check_fraction(route, return_lse)
    return mix(q, kv, routing, scale, q_begin, q_end)


def both_branches(
    attend: Attend,
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float,
    q_begin: Tensor | None,
    q_end: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(out, lse)`` with everything full, and with everything sparse: two hard calls."""
    route, full, sparse = routing
    assert route is not None
    choice = torch.zeros(route.shape, dtype=torch.int32, device=q.device)
    # In each call, in place of the pattern that no route chooses, the one that costs nothing to choose blocks for.
    return (
        attend(q, kv, Routing(choice, full, Full()), scale, q_begin, q_end),
        attend(q, kv, Routing(choice + 1, Full(), sparse), scale, q_begin, q_end),
    )


def walks_once(q: Tensor, kv: KeyValues, routing: Routing) -> bool:
    """Is the operator ``mix``, one walk over the keys for both branches, the way to mix?

    On the CPU always. On CUDA it takes mixtures whose full pattern shows every key, so that the sparse one's are part
    of it (``csrc/core/mixture_parts.h``); and where two calls are faster, they stay.
    """
    return q.is_cpu or (q.is_cuda and isinstance(routing.full, Full) and one_walk_is_faster(q, kv, routing.sparse))


def one_walk_is_faster(q: Tensor, kv: KeyValues, sparse: Pattern) -> bool:
    """Of a mixture that the CUDA operator takes: than two calls of attention?

    Not of a few queries, nor of less than half as many queries as keys: attention shares out the keys of such, a walk
    does not. (Lengths are those of the tensors; of paged keys that is a page.) Otherwise on Hopper where it has kernels
    for mixtures: up to head dimension 128, and not for lists of 64 keys (``sm90::mixes`` in
    ``csrc/cuda/sm90/sm90.cu`` asks for a little more; what it does not take, the kernels for other GPUs do); on other
    GPUs up to a length beyond which a sparse pattern mostly shows little
    (``docs/decisions/0002-fractional-routes.md``).
    """
    group = q.shape[-2] // max(kv.k.shape[-2], 1)
    q_len, kv_len = q.shape[-3], kv.k.shape[-3]
    if q_len * group <= _FEW_ROWS or 2 * q_len < kv_len:
        return False
    if _is_hopper(q.device.index):
        return q.shape[-1] <= 128 and not (isinstance(sparse, BlockSparse) and sparse.width < 128)
    return kv_len <= _LONG


_FEW_ROWS, _LONG = 64, 16384


def _of_hopper(index: int | None) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index) == (9, 0)


_is_hopper: Callable[[int | None], bool] = torch.compiler.assume_constant_result(_of_hopper)
