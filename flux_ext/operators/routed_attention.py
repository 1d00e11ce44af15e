"""The attention operator with its tensors and patterns, and the public operation on top.

The schema is in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_gradient  # noqa: F401  (makes the operator differentiable)
from .arguments import call, check_tensors, described, to_float
from .block_selection import select_blocks
from .mixture import attend_or_mix
from .operands import KeyValues, Routing, bound_rows
from .patterns import PATTERNS, BlockSparse, Full, Pattern, Streaming

_ops = torch.ops.flux_ext
_CHOICES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def attend(
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by hard routes, with every row bound spelt out: the operator with its tensors and patterns.

    Arguments as for :func:`flux_ext.operators.reference.attend`, the bounds int32, and beyond it block lists by
    threshold for plain batches. Returns ``out`` like ``q`` and ``lse``, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``).

    Raises:
        TypeError, ValueError: as for :func:`attention`; also where packed sequences share rows of q (keys they may
            share), or a threshold meets bounds.
        RuntimeError: in the backward pass, as for :func:`attention`.
    """
    if not isinstance(kv, KeyValues):
        raise TypeError(f"kv must be KeyValues, got {described(kv)}")
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be Routing, got {described(routing)}")
    optional = {
        "route": routing.route,
        "q_begin": q_begin,
        "q_end": q_end,
        "kv_begin": kv.begin,
        "kv_end": kv.end,
        "page_table": kv.page_table,
    }
    check_tensors({"q": q, "k": kv.k, "v": kv.v}, optional)
    return _attend(q, kv, routing, scale, q_begin, q_end)


def _attend(
    q: Tensor, kv: KeyValues, routing: Routing, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, its tensors known to be tensors."""
    if type(scale) is not float:
        scale = to_float("scale", scale)
    k, v, kv_begin, kv_end, page_table = kv
    route, full, sparse = routing
    if route is not None and route.dtype != torch.int32:
        if route.dtype not in _CHOICES or route.layout is not torch.strided:
            kind = route.dtype if route.layout is torch.strided else route.layout
            raise ValueError(
                f"route must be a dense tensor of integers or booleans, or for a mixture floats, got {kind}"
            )
        route = route.long().clamp(-1, 2).to(torch.int32)  # what is neither 0 nor 1 stays so
    patterns: list[int] = []
    lists: list[Tensor | None] = []
    for name, pattern in (("full", full), ("sparse", sparse)):
        if isinstance(pattern, BlockSparse):
            if pattern.threshold is not None:
                if any(x is not None for x in (q_begin, q_end, kv_begin, kv_end, page_table)):
                    raise ValueError(
                        "BlockSparse(threshold=...) scores plain batches [B, S, H, D] only: "
                        "for packed, padded or cached keys give it blocks"
                    )
                pattern = select_blocks(pattern, q, k)
            patterns += [*pattern.numbers(), pattern.width]
            lists += [pattern.blocks, pattern.full_counts()]
        elif isinstance(pattern, PATTERNS):
            patterns += [*pattern.numbers(), 0]
            lists += [None, None]
        else:
            kinds = ", ".join(kind.__name__ for kind in PATTERNS)
            raise TypeError(f"{name} must be one of {kinds}, got {described(pattern)}")
    # In the order of the schema; AttendArguments is the way back.
    return call(_ops.attend, q, k, v, route, patterns, *lists, scale, q_begin, q_end, kv_begin, kv_end, page_table)


def _values_hidden(x: Tensor) -> bool:
    """Whether to look at values would wait for the device, or there are none yet."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cpu


def _mixing_weight(route: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A fractional route ``[B]`` or ``[B, Hkv]`` as a factor that broadcasts over the output; NaN outside [0, 1]."""
    slack = 2 * torch.finfo(route.dtype).eps  # of 1 + r - r
    outside = ~((route >= -slack) & (route <= 1 + slack))
    if not _values_hidden(route) and outside.any():
        raise ValueError(f"a fractional route must be within [0, 1], got {route[outside][0].item()}")
    w = route.masked_fill(outside, torch.nan)
    w = w[:, None] if w.dim() == 1 else w
    w = w.repeat_interleave(q.shape[-2] // w.shape[1], 1).to(q.dtype)  # [B, Hq]
    if cu_seqlens is None:
        return w[:, None, :, None]
    # Which sequence a row belongs to, without reading lengths back from the device; rows after the last to none.
    rows = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return F.pad(w, (0, 0, 0, 1))[sequence][:, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None = None,
    *,
    sparse: Pattern = Streaming(),
    full: Pattern = Full(),
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    kv_len: Tensor | None = None,
    page_table: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # a tensor, or two with return_lse
    """Causal attention in which each sequence, or each KV head, is routed to full or sparse attention.

    ``out = softmax(scale * q k^T + mask) v`` with fp32 softmax and accumulation; queries are aligned
    bottom-right (query ``i`` stands at position ``kv_len - q_len + i``). A query that sees no key gives 0.
    Flux Attention (arXiv 2604.07394) routes by layer, Elastic Attention (arXiv 2601.17367) by head.

    Args:
        q: ``[B, S, Hq, D]``, or packed ``[T, Hq, D]``; fp16, bf16 (CPU: fp32 too). Any strides with the last
            dimension contiguous; ``D`` a multiple of 8 up to 256.
        k, v: ``[B, Skv, Hkv, D]``, ``Hkv`` a divisor of ``Hq``; packed like q, ``[T, Hkv, D]``; paged
            ``[num_pages, page_size, Hkv, D]`` (``[num_pages, page_size, 1, D]`` with a page table per head).
            Queries in a batch or packed may see keys in a cache, contiguous or paged.
        route: ``[B]`` or ``[B, Hkv]``. Integers or booleans are a hard choice, 0 full and 1 sparse, and
            cost only what is visible. Floating-point ``w`` in [0, 1] mixes ``(1 - w) * full + w * sparse``,
            differentiable in q, k, v and w (training). None: all full.
        sparse, full: the two patterns; see :mod:`flux_ext.operators.patterns`.
        scale: softmax scale, finite; default ``D ** -0.5``.
        cu_seqlens: int32 ``[B + 1]``, the packed sequences' row bounds, from 0: of q, and of k and v where those
            are packed too. Rows after the last bound give 0. Over a cache, the ``q_len`` queries of a sequence are
            its last tokens: their own keys are in the cache already, ``kv_len`` counts them (chunked prefill, prefill
            after a cached prefix).
        seq_start, seq_end: int32 ``[B]``, the rows ``[start, end)`` of q, k and v that belong to each sequence
            of a padded batch (left padding: ``seq_start``; right padding: ``seq_end``). Padding rows of the
            output are 0. They exclude ``cu_seqlens`` and ``kv_len``.
        kv_len: int32 ``[B]`` or ``[B, Hkv]``, the filled rows of a cache longer than that, the queries' included.
            Without it and ``cu_seqlens``, there are no more queries than keys.
        page_table: int32 ``[B, max_pages]`` or ``[B, Hkv, max_pages]``; needs ``kv_len``. Entries beyond
            ``kv_len`` are never read.
        return_lse: also return the natural log-sum-exp, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``); ``-inf``
            where a query sees no key. Not differentiable; needs a hard route.

    Returns:
        ``out`` with the shape and dtype of ``q``, or ``(out, lse)``.

    Forward-mode derivatives and ``torch.func`` are right to any order, by plain PyTorch with dense masks
    (:mod:`flux_ext.operators.reference`); ``torch.func.vmap`` calls the operator once per entry.

    Raises:
        TypeError: something else where a tensor, a pattern or a number belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value.
        RuntimeError: in the backward pass over a ``page_table``, on CUDA (no gradient yet), and in a second one.

    Values inside CUDA tensors are not read back. There, bounds outside the tensors are clamped: rows before the first
    of ``cu_seqlens`` give 0, a bound that decreases ends an empty sequence, and rows of q that sequences share have the
    result of either. An integer route other than 0 is sparse; a fraction outside [0, 1], NaN included, makes the
    outputs of its sequence or head NaN (so it does where ``torch.compile`` traces). Counts of block lists are clamped;
    lists that are not ascending, or that leave the keys up to the diagonal, give no defined result.
    """
    required = {"q": q, "k": k, "v": v}
    optional = {
        "route": route,
        "cu_seqlens": cu_seqlens,
        "seq_start": seq_start,
        "seq_end": seq_end,
        "kv_len": kv_len,
        "page_table": page_table,
    }
    check_tensors(required, optional)
    kv, q_begin, q_end = bound_rows(q, k, v, cu_seqlens, seq_start, seq_end, kv_len, page_table)
    routing = Routing(route, full, sparse)
    return attend_or_mix(_attend, _mixing_weight, q, kv, routing, scale, q_begin, q_end, cu_seqlens, return_lse)
