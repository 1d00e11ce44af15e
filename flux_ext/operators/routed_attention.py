"""Attention: ``attend`` and ``mix``, which are the operators with their tensors and patterns, and ``attention`` on top.

The operators' schemas are in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import attention_gradient, mixture_gradient  # noqa: F401  (make the operators differentiable)
from .arguments import call, check_devices, check_tensors, described, to_float
from .block_selection import select_blocks
from .mixture import attend_or_mix, both_branches, check_fraction, walks_once
from .operands import AttendArguments, KeyValues, Routing, bound_rows
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
    """Attention by hard routes, with the bounds of every sequence as tensors: the operator without conveniences.

    Arguments as for :func:`flux_ext.operators.reference.attend`, but the bounds are int32. Returns ``out`` like ``q``
    and ``lse``, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``).

    Raises:
        TypeError, ValueError: as for :func:`attention`; also where packed sequences share rows of q (keys they may
            share).
        RuntimeError: in the backward pass, as for :func:`attention`.
    """
    _check_operands(q, kv, routing, q_begin, q_end)
    return _attend(q, kv, routing, scale, q_begin, q_end)


def _check_operands(q: Tensor, kv: KeyValues, routing: Routing, q_begin: Tensor | None, q_end: Tensor | None) -> None:
    """TypeError where something is not what it should be."""
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


def _attend(
    q: Tensor, kv: KeyValues, routing: Routing, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, its tensors known to be tensors."""
    out, lse = call(_ops.attend, *operator_arguments(q, kv, routing, scale, q_begin, q_end))
    return out, lse


def operator_arguments(
    q: Tensor, kv: KeyValues, routing: Routing, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> AttendArguments:
    """What the operator takes for the arguments of :func:`attend`: patterns as numbers and lists, the route int32.

    Raises:
        TypeError, ValueError: something is no pattern, the route is neither integers nor booleans, the scale is no
            number, or as for :func:`select_blocks` where a pattern has a threshold or a name.
    """
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
    for mode, name, pattern in ((0, "full", full), (1, "sparse", sparse)):
        if isinstance(pattern, BlockSparse):
            if pattern.blocks is None:
                pattern = select_blocks(
                    pattern,
                    q,
                    k,
                    scale,
                    route=route,
                    mode=mode,
                    q_begin=q_begin,
                    q_end=q_end,
                    kv_begin=kv_begin,
                    kv_end=kv_end,
                    page_table=page_table,
                )
            patterns += [*pattern.numbers(), pattern.width]
            lists += [pattern.blocks, pattern.full_counts()]
        elif isinstance(pattern, PATTERNS):
            patterns += [*pattern.numbers(), 0]
            lists += [None, None]
        else:
            kinds = ", ".join(kind.__name__ for kind in PATTERNS)
            raise TypeError(f"{name} must be one of {kinds}, got {described(pattern)}")
    full_blocks, full_counts, sparse_blocks, sparse_counts = lists
    return AttendArguments(
        q,
        k,
        v,
        route,
        patterns,
        full_blocks,
        full_counts,
        sparse_blocks,
        sparse_counts,
        scale,
        q_begin,
        q_end,
        kv_begin,
        kv_end,
        page_table,
    )


def _values_hidden(x: Tensor) -> bool:
    """Whether to look at values would wait for the device, or there are none yet."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cpu


def mix(
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
) -> Tensor:
    """``(1 - w) * full + w * sparse`` for a route that is a weight ``w`` in [0, 1], floats ``[B]`` or ``[B, Hkv]``.

    In one walk over the keys, forward and backward (``csrc/core/mixture.h``). On CUDA, where the full pattern hides
    keys or that would be slower, by two calls of :func:`attend`, with the gradient that autograd makes of them. Other
    arguments as there.

    Returns:
        Like ``q``; 0 in rows that belong to no sequence.

    Raises:
        TypeError, ValueError: as for :func:`attend`, and where the route is no such weight.
        RuntimeError: in the backward pass, as for :func:`attention`.
    """
    _check_operands(q, kv, routing, q_begin, q_end)
    if routing.route is None or not routing.route.is_floating_point():
        kind = "None" if routing.route is None else routing.route.dtype
        raise ValueError(f"route must be a weight, floats [B] or [B, Hkv], got {kind}")
    check_fraction(routing.route)
    return _mix(q, kv, routing, scale, q_begin, q_end)


def _mix(
    q: Tensor, kv: KeyValues, routing: Routing, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> Tensor:
    """:func:`mix`, its tensors known to be tensors and its route to be a weight."""
    assert routing.route is not None
    if not walks_once(q, kv, routing):
        return _mix_by_two_calls(q, kv, routing, scale, q_begin, q_end)
    check_devices("q", q, k=kv.k, v=kv.v, route=routing.route)
    arguments = operator_arguments(q, kv, routing._replace(route=None), scale, q_begin, q_end)
    weight = _weight(routing.route).float()
    mixed: Tensor = call(_ops.mix, *arguments._replace(route=weight))[0]
    return mixed


def _mix_by_two_calls(
    q: Tensor, kv: KeyValues, routing: Routing, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> Tensor:
    assert routing.route is not None
    (full, _), (sparse, _) = both_branches(_attend, q, kv, routing, scale, q_begin, q_end)
    w = _of_rows(_weight(routing.route), q, q_begin, q_end)  # after attend, which checks the shape of the route
    return (1 - w) * full + w * sparse


def _weight(route: Tensor) -> Tensor:
    """A fractional route, NaN outside [0, 1]; ValueError where that can be seen without waiting for the device."""
    slack = 2 * torch.finfo(route.dtype).eps  # a straight-through weight, 1 + r - r.detach(), is off by rounding
    outside = route != route.detach().clamp(-slack, 1 + slack)  # NaN too
    if not _values_hidden(route) and outside.any():
        raise ValueError(f"a fractional route must be within [0, 1], got {route[outside][0].item()}")
    return route.masked_fill(outside, torch.nan)


def _of_rows(w: Tensor, q: Tensor, q_begin: Tensor | None, q_end: Tensor | None) -> Tensor:
    """A weight ``[B]`` or ``[B, Hkv]`` as a factor that broadcasts over the output."""
    w = w[:, None] if w.dim() == 1 else w
    w = w.repeat_interleave(q.shape[-2] // w.shape[1], 1)  # [B, Hq]
    if q.dim() == 4:
        return w.to(q.dtype)[:, None, :, None]
    w = w.to(torch.promote_types(w.dtype, torch.float32))  # its gradient adds up one row after the other
    assert q_begin is not None
    begin, end = (q_begin[:-1], q_begin[1:]) if q_end is None else (q_begin, q_end)
    # A row's sequence, found without reading lengths back from the device: the first that ends behind it. Rows that
    # belong to none may have any weight: what they are weighed with is 0.
    end, order = torch.where(begin < end, end, 0).sort()
    rows = torch.arange(q.shape[0], device=q.device)
    sequence = order[torch.searchsorted(end, rows, right=True).clamp(max=len(order) - 1)]
    return w[sequence].to(q.dtype)[:, :, None]


def bound_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    kv_len: Tensor | None,
    page_table: Tensor | None,
) -> tuple[KeyValues, Tensor | None, Tensor | None]:
    """:func:`~flux_ext.operators.operands.bound_rows` of arguments that somebody else gave: TypeError for no tensor."""
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
    return bound_rows(q, k, v, cu_seqlens, seq_start, seq_end, kv_len, page_table)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None = None,
    *,
    sparse: Pattern = ...,
    full: Pattern = ...,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    kv_len: Tensor | None = None,
    page_table: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None = None,
    *,
    sparse: Pattern = ...,
    full: Pattern = ...,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    kv_len: Tensor | None = None,
    page_table: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which each sequence, or each KV head, is routed to full or sparse attention.

    ``out = softmax(scale * q k^T + mask) v``, softmax and accumulation in fp32. The mask is that of the pattern to
    which the sequence or head is routed; a query that sees no key gives 0. Queries are the last tokens of their
    sequence: query ``i`` of ``q_len`` stands at position ``kv_len - q_len + i`` of ``kv_len`` keys. Flux Attention
    (arXiv 2604.07394) routes by layer, Elastic Attention (arXiv 2601.17367) by head.

    Where the keys of a sequence are is said by some of the last five arguments:

    - A batch, ``q [B, S, Hq, D]`` and ``k``, ``v [B, Skv, Hkv, D]``: nothing, or ``seq_start`` and ``seq_end`` where it
      is padded.
    - Packed, ``q [T, Hq, D]`` and ``k``, ``v [T, Hkv, D]``: ``cu_seqlens``.
    - Over a cache ``[B, Skv, Hkv, D]`` of which some rows are filled: ``kv_len``. The queries' own keys are among them,
      which serves decode steps, chunks of a prompt and prompts after a cached prefix. Queries may be packed.
    - Over a paged cache, ``[num_pages, page_size, Hkv, D]``, or ``[num_pages, page_size, 1, D]`` where every head has
      pages of its own: ``kv_len`` and ``page_table``.

    Args:
        q, k, v: fp16, bf16 (CPU: fp32 too). ``Hkv`` divides ``Hq``; ``D`` is a multiple of 8 up to 256. Any strides
            with the last dimension contiguous.
        route: ``[B]`` or ``[B, Hkv]``. Integers or booleans choose, 0 full and 1 sparse: only what is visible is
            computed. Floating-point weights ``w`` in [0, 1] mix ``(1 - w) * full + w * sparse``, for training: both are
            computed, mostly in one walk over the keys, and the result is differentiable in w too. None: all full.
        sparse, full: the two patterns; see :mod:`flux_ext.operators.patterns`.
        scale: softmax scale, finite; default ``D ** -0.5``.
        cu_seqlens: int32 ``[B + 1]``, from 0: sequence ``b`` has rows ``[cu_seqlens[b], cu_seqlens[b + 1])`` of q, and
            of k and v where those are packed too. Rows after the last bound give 0.
        seq_start, seq_end: int32 ``[B]``, rows ``[start, end)`` of q, k and v belong to each sequence (left padding:
            ``seq_start``; right padding: ``seq_end``). Padding rows give 0. Not beside ``cu_seqlens`` or ``kv_len``.
        kv_len: int32 ``[B]`` or ``[B, Hkv]``, the filled rows of the cache, the queries' included. Without it and
            ``cu_seqlens`` there must be no more queries than keys.
        page_table: int32 ``[B, max_pages]`` or ``[B, Hkv, max_pages]``, each sequence's pages in order; needs
            ``kv_len``. Entries beyond ``kv_len`` are never read.
        return_lse: also return the natural log-sum-exp, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``); ``-inf``
            where a query sees no key. Not differentiable; not with weights as the route.

    Returns:
        ``out`` with the shape and dtype of ``q``, or ``(out, lse)``.

    Raises:
        TypeError: something else where a tensor, a pattern or a number belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value.
        RuntimeError: in the backward pass over a ``page_table``, and in a second one.

    Forward-mode derivatives and ``torch.func`` are right to any order, by plain PyTorch with dense masks
    (:mod:`flux_ext.operators.reference`); ``torch.func.vmap`` calls the operator once per entry.

    On CUDA, values inside tensors are not read back to be checked, for that would wait for the device. There

    - bounds outside the tensors are clamped, and so are counts of block lists; rows before the first of ``cu_seqlens``
      give 0, and where bounds decrease the sequence is empty;
    - rows of q that two sequences share have the result of either; packed rows of k and v that two share have the
      gradient NaN where ``kv_begin`` and ``kv_end`` of :class:`KeyValues` say so, and that of one of them where
      ``cu_seqlens`` decreases (the CPU refuses both);
    - an integer route other than 0 is sparse; a weight outside [0, 1], NaN included, makes what its sequence or head
      gives NaN (this also where ``torch.compile`` traces, on any device);
    - block lists that are not ascending, or that go beyond the diagonal, give no defined result.
    """
    kv, q_begin, q_end = bound_operands(q, k, v, route, cu_seqlens, seq_start, seq_end, kv_len, page_table)
    routing = Routing(route, full, sparse)
    return attend_or_mix(_attend, _mix, q, kv, routing, scale, q_begin, q_end, return_lse)
