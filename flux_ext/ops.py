"""The registered operators' Python side (shape functions, gradients), and the public operation on top.

The schemas are in ``csrc/torch/library.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library  # noqa: F401  (registers the operators)
from .block_sparse import select_blocks
from .patterns import BlockSparse, Full, Pattern, Streaming

_ops = torch.ops.flux_ext
_BROKEN_RULE = "invalid argument: "
"""How the operators' messages begin where an argument breaks a rule (csrc/core/broken_rule.h)."""


def _call(operator: Callable[..., Any], *args: Any) -> Any:
    """What an operator returns; its broken rules as ValueError, which torch 2.15 and later report as RuntimeError."""
    try:
        return operator(*args)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        if not message.startswith(_BROKEN_RULE):
            raise
        raise ValueError(message.removeprefix(_BROKEN_RULE)) from None


@torch.library.register_fake("flux_ext::attend")
def _(q, k, v, *args):
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("flux_ext::attend_backward")
def _(grad_out, q, k, v, *args):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


@torch.library.register_fake("flux_ext::route")
def _(x, weights, pool_size, per_head, begin, end):
    batch = begin.shape[0] if x.dim() == 3 else x.shape[0]
    leading = (batch, x.shape[-2]) if per_head else (batch,)
    return (
        x.new_empty((*leading, x.shape[-1]), dtype=torch.float32),
        x.new_empty((*leading, 2), dtype=torch.float32),
        x.new_empty(leading, dtype=torch.int32),
    )


@torch.library.register_fake("flux_ext::append")
def _(*args):
    return None


def _save_attend(ctx, inputs, output):
    q, k, v, route, patterns, fb, fc, sb, sc, scale, q_begin, q_end, kv_begin, kv_end, page_table = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.patterns, ctx.scale = patterns, scale
    ctx.save_for_backward(q, k, v, out, lse, route, fb, fc, sb, sc, q_begin, q_end, kv_begin, kv_end, page_table)


def _attend_backward(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, route, fb, fc, sb, sc, *spans, page_table = ctx.saved_tensors
    if page_table is not None:
        raise RuntimeError("attention over a paged cache (page_table) has no gradient: it is for inference")
    if q.is_cuda:
        raise RuntimeError(
            "attention has no gradient on CUDA yet: train with the counterfactual objective, which needs none, "
            "or on the CPU"
        )
    grads = _call(
        _ops.attend_backward, grad_out, q, k, v, out, lse, route, ctx.patterns, fb, fc, sb, sc, ctx.scale, *spans
    )
    return (*grads, *(None,) * 12)


torch.library.register_autograd("flux_ext::attend", _attend_backward, setup_context=_save_attend)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError("attention has no second gradient (create_graph=True)")


torch.library.register_autograd("flux_ext::attend_backward", _no_second_gradient)


def _save_route(ctx, inputs, output):
    x, weights, ctx.pool_size, ctx.per_head, begin, end = inputs
    pooled, _, route = output
    ctx.mark_non_differentiable(pooled, route)
    # Frozen queries are not kept: with a router in every layer they would be the backbone's activations.
    kept = x if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(kept, pooled, begin, end, *weights)


def _silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _route_backward(ctx, _grad_pooled, grad, _grad_route):
    x, pooled, begin, end, *weights = ctx.saved_tensors
    w = [t.float() for t in weights]
    # Forward again (five small layers), keeping each layer's input and pre-activation.
    inputs, before = [pooled], []
    for i in range(5):
        before.append(F.linear(inputs[i], w[2 * i], w[2 * i + 1]))
        inputs.append(before[i] if i == 1 else F.silu(before[i]))  # no SiLU between encoder and classifier
    grad_weights: list[Tensor] = []
    for i in reversed(range(5)):
        if i not in (1, 4):
            grad = grad * _silu_grad(before[i])
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weights[:0] = [flat.T @ inputs[i].reshape(-1, inputs[i].shape[-1]), flat.sum(0)]
        grad = grad @ w[2 * i]
    grad_weights = [g.to(t.dtype) for g, t in zip(grad_weights, weights, strict=True)]
    grad_x = _pool_backward(x, grad, ctx.pool_size, ctx.per_head, begin, end) if ctx.needs_input_grad[0] else None
    return grad_x, grad_weights, None, None, None, None


def _pool_backward(
    x: Tensor, grad: Tensor, pool_size: int, per_head: bool, begin: Tensor | None, end: Tensor | None
) -> Tensor:
    """Gradient of the pooled mean: rows at either end of each sequence get their share, twice on overlap."""
    rows = torch.arange(x.shape[-3], device=x.device)[None]  # [1, S]
    first = rows.new_zeros((x.shape[0] if x.dim() == 4 else 1, 1)) if begin is None else begin[:, None]
    last = torch.full_like(first, x.shape[-3]) if end is None else end[:, None]
    inside = (rows >= first) & (rows < last)
    count = (inside & (rows < first + pool_size)).float() + (inside & (rows >= last - pool_size))
    share = count / (2 * (last - first).clamp(1, pool_size))  # [B, S]
    if not per_head:
        grad = (grad / x.shape[-2])[:, None].expand(-1, x.shape[-2], -1)  # [B, H, D]
    if x.dim() == 3:  # packed: the sequences share the rows
        return torch.einsum("bs,bhd->shd", share, grad).to(x.dtype)
    return (share[:, :, None, None] * grad[:, None]).to(x.dtype)


torch.library.register_autograd("flux_ext::route", _route_backward, setup_context=_save_route)


def _check_devices(name: str, first: Tensor, **others: Tensor | None) -> None:
    """All on the device of the first. (The dispatcher would take a tensor elsewhere for a question about shapes.)"""
    for other, t in others.items():
        if t is not None and t.device != first.device:
            raise ValueError(f"{other} must be on the device of {name} ({first.device}), got {t.device}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None,
    full: Pattern,
    sparse: Pattern,
    scale: float,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
    kv_begin: Tensor | None = None,
    kv_end: Tensor | None = None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by hard routes, with every row bound spelt out: the operator with its tensors and patterns.

    Arguments as for :func:`flux_ext.reference.attend`, the bounds int32, and beyond it block lists by threshold for
    plain batches. Returns ``out`` like ``q`` and ``lse``, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``).

    Raises:
        ValueError: as for :func:`attention`; also where packed sequences share rows of q (keys they may share; on
            CUDA bounds are not read back, and shared rows of q get the result of either), or a threshold meets bounds.
        RuntimeError: in the backward pass, as for :func:`attention`.
    """
    _check_devices(
        "q",
        q,
        k=k,
        v=v,
        route=route,
        q_begin=q_begin,
        q_end=q_end,
        kv_begin=kv_begin,
        kv_end=kv_end,
        page_table=page_table,
    )
    if route is not None and route.dtype != torch.int32:
        if route.is_complex():
            raise ValueError(f"route must be of integers, booleans or fractions, got {route.dtype}")
        route = route.long().clamp(-1, 2).to(torch.int32)  # what is neither 0 nor 1 stays so
    patterns: list[int] = []
    lists: list[Tensor | None] = []
    for pattern in (full, sparse):
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
        else:
            patterns += [*pattern.numbers(), 0]
            lists += [None, None]
    return _call(_ops.attend, q, k, v, route, patterns, *lists, scale, q_begin, q_end, kv_begin, kv_end, page_table)


def row_spans(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    kv_len: Tensor | None,
    page_table: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(q_begin, q_end, kv_begin, kv_end)`` of :func:`attend`, from the arguments of :func:`attention`.

    Raises:
        ValueError: they contradict each other, or a shape or dtype is wrong.
    """
    for x, rule in (
        (q, "q must be [B, S, Hq, D], or packed [T, Hq, D]"),
        (k, "k must be [B, Skv, Hkv, D], packed [T, Hkv, D] or pages [num_pages, page_size, Hkv or 1, D]"),
    ):
        if x.dim() not in (3, 4):
            raise ValueError(f"{rule}, got {list(x.shape)}")
    padded = seq_start is not None or seq_end is not None
    if padded and (cu_seqlens is not None or kv_len is not None):
        raise ValueError("seq_start and seq_end bound the rows of q, k and v alike: they exclude cu_seqlens and kv_len")
    if page_table is not None and kv_len is None:
        raise ValueError("page_table needs kv_len")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens must be [B + 1] with B >= 1, got shape {list(cu_seqlens.shape)}")
    for name, bounds in (("cu_seqlens", cu_seqlens), ("seq_start", seq_start), ("seq_end", seq_end)):
        if bounds is not None and bounds.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {bounds.dtype}")
    if padded and k.shape[-3] != q.shape[-3]:
        raise ValueError(
            f"seq_start and seq_end bound the rows of q and k alike: k must have the {q.shape[-3]} rows of q, "
            f"got {k.shape[-3]}"
        )
    if (cu_seqlens is not None) != (q.dim() == 3):
        raise ValueError(
            f"cu_seqlens goes with a packed q [T, Hq, D], got q of shape {list(q.shape)} "
            f"{'with' if cu_seqlens is not None else 'without'} cu_seqlens"
        )
    if padded:
        return seq_start, seq_end, seq_start, seq_end
    if cu_seqlens is None:
        return None, None, None, kv_len
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    if k.dim() != 3:  # a cache
        return begin, end, None, kv_len
    if kv_len is not None:
        raise ValueError(
            "kv_len bounds a cache [B, Skv, Hkv, D] or pages, a packed k is bounded by cu_seqlens: "
            f"got both and k of shape {list(k.shape)}"
        )
    return begin, end, begin, end


def _mixing_weight(route: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A fractional route ``[B]`` or ``[B, Hkv]`` as a factor that broadcasts over the output."""
    w = route[:, None] if route.dim() == 1 else route
    w = w.repeat_interleave(q.shape[-2] // w.shape[1], 1).to(q.dtype)  # [B, Hq]
    if cu_seqlens is None:
        return w[:, None, :, None]
    # Which sequence a row belongs to, without reading lengths back from the device.
    rows = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return w[sequence.clamp(max=len(w) - 1)][:, :, None]


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
            cost only what is visible. Floating-point ``w`` mixes ``(1 - w) * full + w * sparse``,
            differentiable in q, k, v and w (training). None: all full.
        sparse, full: the two patterns; see :mod:`flux_ext.patterns`.
        scale: softmax scale; default ``D ** -0.5``.
        cu_seqlens: int32 ``[B + 1]``, the packed sequences' row bounds, from 0: of q, and of k and v where those
            are packed too. Over a cache, the ``q_len`` queries of a sequence are its last tokens: their own keys
            are in the cache already, ``kv_len`` counts them (chunked prefill, prefill after a cached prefix).
        seq_start, seq_end: int32 ``[B]``, the rows ``[start, end)`` of q, k and v that belong to each sequence
            of a padded batch (left padding: ``seq_start``; right padding: ``seq_end``). Padding rows of the
            output are 0. They exclude ``cu_seqlens`` and ``kv_len``.
        kv_len: int32 ``[B]`` or ``[B, Hkv]``, the filled rows of a cache longer than that, the queries' included.
        page_table: int32 ``[B, max_pages]`` or ``[B, Hkv, max_pages]``; needs ``kv_len``. Entries beyond
            ``kv_len`` are never read.
        return_lse: also return the natural log-sum-exp, fp32 ``[B, Hq, S]`` (packed ``[Hq, T]``); ``-inf``
            where a query sees no key. Not differentiable; needs a hard route.

    Returns:
        ``out`` with the shape and dtype of ``q``, or ``(out, lse)``.

    Raises:
        ValueError: an argument breaks a rule; the message names argument, rule and value. Values inside CUDA
            tensors are not read back: bounds outside the tensors are clamped.
        RuntimeError: in the backward pass over a ``page_table``, on CUDA (no gradient yet), and in a second one.
    """
    spans = row_spans(q, k, cu_seqlens, seq_start, seq_end, kv_len, page_table)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def run(hard: Tensor | None) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, hard, full, sparse, scale, *spans, page_table)

    if route is not None and route.is_floating_point():
        if route.dim() not in (1, 2):
            raise ValueError(f"route must be [B] or [B, Hkv], got shape {list(route.shape)}")
        if return_lse:
            raise ValueError("return_lse needs a hard route: a mixture has no log-sum-exp")
        hard = torch.zeros(route.shape, dtype=torch.int32, device=q.device)
        w = _mixing_weight(route, q, cu_seqlens)
        return (1 - w) * run(hard)[0] + w * run(hard + 1)[0]
    out, lse = run(route)
    return (out, lse) if return_lse else out


def route(
    x: Tensor,
    weights: list[Tensor],
    pool_size: int,
    per_head: bool,
    begin: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Router scoring in one operator: pool, two MLPs, decision; see :func:`flux_ext.reference.route`.

    ``x`` fp16, bf16 or fp32; weights of one such dtype; bounds int32. Returns logits, fp32, differentiable in ``x``
    and the weights, and the route, int32.

    Raises:
        ValueError: an argument breaks a rule; on the CPU also a pooled value that is not finite.
    """
    _check_devices("x", x, weights=weights[0] if weights else None, begin=begin, end=end)
    _, logits, decision = _call(_ops.route, x, weights, pool_size, per_head, begin, end)
    return logits, decision


def append(
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    base: Tensor,
    ring: Tensor,
    page_table: Tensor,
    kv_len: Tensor,
    seen: Tensor,
    slots: Tensor,
    pattern: Streaming,
    max_cache_len: int,
) -> None:
    """One token more in every row of a cache with fixed addresses, in place and in one launch.

    A row, i.e. (sequence, KV head), owns the pages of the pools from ``base`` on. Its token ``t`` lies in page
    ``base + place(t // page_size)``, where ``place`` keeps the pages of the sink (``ceil(sink / page_size)`` of
    them) and goes round the ``ring`` pages after those. A row whose sink and ring have fewer pages than
    ``page_table`` has columns drops, in whole pages and multiples of ``align``, what lies between the sink and the
    window: ``page_table`` and ``kv_len`` then say what is stored, in order, as :func:`attention` takes it.

    All on one device; all but k and v contiguous. Nothing is read back from the device. k and v are not
    differentiated: this is for inference.

    Args:
        k, v: the new tokens, ``[B, Hkv, 1, D]``, fp16, bf16 or fp32, ``D`` up to 256; any strides with the last
            dimension contiguous. Cast to the pools' dtype.
        k_pool, v_pool: ``[num_pages, page_size, 1, D]``, both fp16, bf16 or fp32; the tokens are written here.
        base: int32 ``[B, Hkv]``, the first page of each row.
        ring: int32 ``[B, Hkv]``, the pages each row goes round: at least
            ``ceil((window + lcm(align, page_size) - 1) / page_size)`` where it drops.
        page_table: int32 ``[B, Hkv, max_pages]``. Of each row the entries that count by ``kv_len`` are written.
        kv_len: int32 ``[B, Hkv]``, written: the tokens stored, the new one included.
        seen: int32 ``[B, Hkv]``, the tokens so far, i.e. the position of the new one; counted up. (One count per
            row, though a sequence's are equal: so no thread block reads what another writes.)
        slots: int64, one number, counted up.
        pattern: what sparse rows see.
        max_cache_len: tokens per row, at most ``max_pages * page_size``. A token more replaces the last one.

    Raises:
        ValueError: an argument breaks a rule; the message names argument, rule and value, and nothing was written.
            Values inside CUDA tensors are not read back: pages outside the pools are clamped.
    """
    _check_devices(
        "k",
        k,
        v=v,
        k_pool=k_pool,
        v_pool=v_pool,
        base=base,
        ring=ring,
        page_table=page_table,
        kv_len=kv_len,
        seen=seen,
        slots=slots,
    )
    _call(
        _ops.append,
        k.detach(),
        v.detach(),
        k_pool,
        v_pool,
        base,
        ring,
        page_table,
        kv_len,
        seen,
        slots,
        pattern.numbers(),
        max_cache_len,
    )
