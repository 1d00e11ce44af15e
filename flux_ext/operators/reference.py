"""The slow, obvious twins: plain PyTorch that says what every operator computes.

Same names and signatures as in :mod:`flux_ext.operators`; any floating dtype, differentiable, one dense mask for every
KV head of every sequence. Tests compare everything else with these, so what they compute is written out here and not
taken from elsewhere, but for the patterns (``dense_mask``) and for what becomes of the arguments before any arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixture import attend_or_mix, both_branches
from .operands import KeyValues, Routing, bound_rows
from .pattern_functions import Q_BLOCK
from .patterns import BlockSparse, Full, Pattern, Streaming, dense_mask


def _gather_pages(cache: Tensor, pages: Tensor, head: int, length: int) -> Tensor:
    """The first ``length`` rows of one head of a paged cache: ``[length, D]``."""
    count = -(-length // cache.shape[1])
    head = head if cache.shape[2] > 1 else 0
    return cache[pages[:count].long(), :, head].reshape(-1, cache.shape[-1])[:length]


_SequenceHead: TypeAlias = tuple[int, int, int, Tensor, Tensor, Tensor]


def _sequence_heads(q: Tensor, kv: KeyValues, q_begin: Tensor | None, q_end: Tensor | None) -> Iterator[_SequenceHead]:
    """Each KV head of each sequence: ``(b, h, first row of q, queries [S, group, D], keys [T, D], values [T, D])``."""
    k, v, kv_begin, kv_end, page_table = kv
    packed = q.dim() == 3
    num_kv_heads = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else k.shape[-2]
    group = q.shape[-2] // num_kv_heads
    if packed and q_end is None:  # cu_seqlens
        assert q_begin is not None
        q_begin, q_end = q_begin[:-1], q_begin[1:]
    if k.dim() == 3 and kv_end is None:
        assert kv_begin is not None
        kv_begin, kv_end = kv_begin[:-1], kv_begin[1:]
    batch = len(q_begin) if packed else q.shape[0]  # type: ignore[arg-type]
    capacity = page_table.shape[-1] * k.shape[1] if page_table is not None else k.shape[-3]
    for b, h in product(range(batch), range(num_kv_heads)):
        q0, q1 = _entry(q_begin, b, 0, 0), _entry(q_end, b, 0, q.shape[-3])
        k0, k1 = _entry(kv_begin, b, h, 0), _entry(kv_end, b, h, capacity)
        if page_table is not None:
            pages = page_table[b, h] if page_table.dim() == 3 else page_table[b]
            keys, values = (_gather_pages(c, pages, h, k1)[k0:] for c in (k, v))
        elif k.dim() == 3:
            keys, values = k[k0:k1, h], v[k0:k1, h]
        else:
            keys, values = k[b, k0:k1, h], v[b, k0:k1, h]
        queries = (q if packed else q[b])[q0:q1, h * group : (h + 1) * group]
        yield b, h, q0, queries, keys, values


def _entry(t: Tensor | None, b: int, h: int, default: int) -> int:
    """Of a tensor ``[B]`` or ``[B, Hkv]``; the default where there is none."""
    if t is None:
        return default
    return int(t[b, h] if t.dim() == 2 else t[b])


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query head: q ``[S, D]``, k, v ``[T, D]``, mask ``[S, T]`` -> out ``[S, D]``, lse ``[S]``."""
    scores = (q @ k.T * scale).masked_fill(~mask, -math.inf)
    seen = mask.any(-1, keepdim=True)
    scores = torch.where(seen, scores, torch.zeros_like(scores))  # no NaN, not even in the gradient
    out = torch.where(seen, torch.softmax(scores, -1) @ v, torch.zeros_like(q[:, :1]))
    lse = torch.where(seen[:, 0], torch.logsumexp(scores, -1), -math.inf)
    return out, lse


_Piece: TypeAlias = tuple[int, Tensor, Tensor]  # first row, out [S, D] and lse [S] of one head and sequence


def _in_place(pieces: list[_Piece], size: int, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces that share no rows, put at their places in ``size`` rows: out ``[size, D]`` and lse ``[size]``.

    Rows that are in no piece are 0 and ``-inf``; ``zero [D]`` has the dtype and device of all.
    """
    outs, lses, end = [], [], 0
    nothing = (size, zero.expand(0, -1), zero[:0])
    for begin, out, lse in (*sorted(pieces, key=lambda piece: piece[0]), nothing):
        gap = max(begin - end, 0)  # an empty piece may stand inside another
        outs += [zero.expand(gap, -1), out]
        lses += [zero.new_full((gap,), -math.inf), lse]
        end = max(end, begin + len(out))
    return torch.cat(outs), torch.cat(lses)


def attend(
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by hard routes, in the dtype of ``q`` (upcast first for a precise answer).

    Args:
        q: ``[B, S, Hq, D]``, or packed ``[T, Hq, D]``.
        kv: keys and values. Packed ones go with a packed q only, a contiguous or paged cache with any q.
        routing: the route and its two patterns.
        scale: softmax scale.
        q_begin, q_end: ``[B]``, rows ``[q_begin, q_end)`` of q belong to the sequence; None: all. Of a packed q they
            must be given: both, or ``cu_seqlens [B + 1]`` as the first alone.

    Returns:
        ``out`` like ``q``, and ``lse`` ``[B, Hq, S]`` (packed ``[Hq, T]``) in the dtype of ``q``, natural logarithm:
        0 and ``-inf`` where a query sees no key and in rows that belong to no sequence.
    """
    packed, num_q_heads = q.dim() == 3, q.shape[-2]
    full, sparse = (_with_lists(x, q, kv, scale, q_begin, q_end) for x in (routing.full, routing.sparse))
    found: list[list[_Piece]] = [[] for _ in range(num_q_heads * (1 if packed else q.shape[0]))]
    for b, h, first, queries, keys, values in _sequence_heads(q, kv, q_begin, q_end):
        pattern = sparse if _entry(routing.route, b, h, 0) else full
        if isinstance(pattern, BlockSparse):
            mask = dense_mask(_lists_of(pattern, b, h), len(queries), len(keys), q.device)[0, 0]
        else:
            mask = dense_mask(pattern, len(queries), len(keys), q.device)
        for g in range(queries.shape[1]):
            head = h * queries.shape[1] + g
            row = head if packed else b * num_q_heads + head
            found[row].append((first, *_attend_one(queries[:, g], keys, values, mask, scale)))
    if not found:
        return torch.zeros_like(q), q.new_zeros((*q.shape[:-3], num_q_heads, q.shape[-3]))
    outs, lses = zip(*(_in_place(pieces, q.shape[-3], q.new_zeros(q.shape[-1])) for pieces in found), strict=True)
    out = torch.stack(outs).view(*q.shape[:-3], num_q_heads, *q.shape[-3::2]).transpose(-3, -2)
    return out, torch.stack(lses).view(*q.shape[:-3], num_q_heads, q.shape[-3])


def mix(
    q: Tensor,
    kv: KeyValues,
    routing: Routing,
    scale: float,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
) -> Tensor:
    """``(1 - w) * full + w * sparse`` of two calls of :func:`attend`, for a route that is a weight ``w``.

    Args as for :func:`attend`, but for ``routing.route``: floats in [0, 1]; what lies outside gives NaN.

    Returns:
        Like ``q``; 0 in rows that belong to no sequence.
    """
    assert routing.route is not None
    (full, _), (sparse, _) = both_branches(attend, q, kv, routing, scale, q_begin, q_end)
    w = _mixing_weight(routing.route, q, q_begin, q_end)
    return (1 - w) * full + w * sparse


def _mixing_weight(route: Tensor, q: Tensor, q_begin: Tensor | None, q_end: Tensor | None) -> Tensor:
    """A fractional route ``[B]`` or ``[B, Hkv]`` as a factor that broadcasts over the output; NaN outside [0, 1]."""
    slack = 2 * torch.finfo(route.dtype).eps  # a straight-through weight, 1 + r - r.detach(), is off by rounding
    w = route.where((route >= -slack) & (route <= 1 + slack), torch.nan)
    w = w[:, None] if w.dim() == 1 else w
    w = w.repeat_interleave(q.shape[-2] // w.shape[1], 1).to(q.dtype)  # [B, Hq]
    if q.dim() == 4:
        return w[:, None, :, None]
    assert q_begin is not None
    bounds = q_begin.tolist() if q_end is None else [*q_begin.tolist(), 0]
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    of_rows = w.new_zeros(q.shape[0], w.shape[1])
    for b, (begin, end) in enumerate(pairwise(bounds)):
        end = end if q_end is None else int(q_end[b])
        of_rows = torch.where((rows >= begin) & (rows < end), w[b], of_rows)
    return of_rows[:, :, None]


def _lists_of(pattern: BlockSparse, b: int, h: int) -> BlockSparse:
    """Of one KV head of one sequence: another one's lists may reach beyond its keys."""
    assert pattern.blocks is not None
    counts = pattern.full_counts()[b : b + 1, h : h + 1]
    return BlockSparse(pattern.blocks[b : b + 1, h : h + 1], counts, pattern.width)


def _with_lists(
    pattern: Pattern, q: Tensor, kv: KeyValues, scale: float, q_begin: Tensor | None, q_end: Tensor | None
) -> Pattern:
    if not isinstance(pattern, BlockSparse):
        return pattern
    return select_blocks(
        pattern,
        q,
        kv.k,
        scale,
        q_begin=q_begin,
        q_end=q_end,
        kv_begin=kv.begin,
        kv_end=kv.end,
        page_table=kv.page_table,
    )


def antidiagonal_scores(q: Tensor, k: Tensor, scale: float, stride: int, width: int) -> Tensor:
    """The estimated attention mass of each pair of a block of 128 queries and a key block, of one KV head.

    In every ``stride x stride`` sub-block of the score matrix only the antidiagonal is summed, which touches every row
    and every column once (XAttention, arXiv 2503.16428). The sums, divided by ``stride`` and soft-maxed along the
    strided keys, estimate how much of a query block's attention falls into each key block.

    Args:
        q: ``[S, group, D]``, k: ``[T, D]``, the queries aligned to the end of the keys.
        scale: of the scores of attention.
        stride: tokens; divides ``width`` and 128.
        width: keys per block.

    Returns:
        ``[q_blocks, kv_blocks]`` in the dtype of q, at least fp32: the sum over a block's queries and the group's
        heads; 0 beyond the diagonal.
    """
    q_len, kv_len = len(q), len(k)
    offset = kv_len - q_len
    # The sum over an antidiagonal, where query a of a sub-block meets key stride - 1 - a, is one dot product of length
    # stride * D: of the sub-block's queries in reverse with its keys.
    rows = F.pad(q, (0, 0, 0, 0, 0, -q_len % stride)).unflatten(0, (-1, stride)).flip(1)
    columns = F.pad(k, (0, 0, 0, -kv_len % stride)).unflatten(0, (-1, stride))
    rows = rows.permute(2, 0, 1, 3).flatten(2)  # [group, S / stride, stride * D]
    columns = columns.flatten(1)  # [T / stride, stride * D]
    scores = (rows @ columns.T).to(torch.promote_types(q.dtype, torch.float32)) * (scale / stride)
    last = (offset + (torch.arange(rows.shape[1], device=q.device) + 1) * stride - 1).clamp(max=kv_len - 1)
    seen = torch.arange(len(columns), device=q.device) * stride <= last[:, None]
    mass = scores.masked_fill(~seen, -math.inf).softmax(-1)
    mass = mass.where(seen.any(-1, keepdim=True), 0).sum(0)  # a row before the first key has none
    mass = F.pad(mass, (0, -mass.shape[1] % (width // stride), 0, -mass.shape[0] % (Q_BLOCK // stride)))
    q_blocks, kv_blocks = mass.shape[0] * stride // Q_BLOCK, mass.shape[1] * stride // width
    return mass.view(q_blocks, Q_BLOCK // stride, kv_blocks, width // stride).sum((1, 3))


def keep_mass(scores: Tensor, threshold: float, q_len: int, kv_len: int, width: int) -> Tensor:
    """The smallest set of key blocks per query block whose share of the scores reaches ``threshold``.

    The first block (the sink) and the diagonal ones are always kept and count. Shares are rounded to multiples of
    2^-30, so that they add up alike in any order; of equal shares the earlier block comes first. All blocks up to the
    diagonal are kept where ``threshold`` is 1, or where the scores of a query block are not finite.

    Args:
        scores: ``[q_blocks, kv_blocks]``, see :func:`antidiagonal_scores`.
        threshold: share of the scores, in (0, 1].
        q_len, kv_len: tokens, the queries aligned to the end of the keys.
        width: keys per block.

    Returns:
        bool ``[q_blocks, kv_blocks]``.
    """
    q_blocks, kv_blocks = scores.shape
    begins = torch.arange(q_blocks, device=scores.device) * Q_BLOCK
    ends = (begins + Q_BLOCK).clamp(max=q_len) + kv_len - q_len
    begins = begins + kv_len - q_len
    index = torch.arange(kv_blocks, device=scores.device)
    allowed = index * width < ends[:, None]
    always = allowed & (((index + 1) * width > begins[:, None]) | (index == 0))
    scores = scores.float().masked_fill(~allowed, 0)
    total = scores.sum(-1, keepdim=True)
    everything = ~(total > 0) | (total == math.inf) | (threshold >= 1)
    units = (scores / total * 2**30).nan_to_num().round().long()
    order = torch.sort(units.masked_fill(always, 2**31), dim=-1, descending=True, stable=True).indices
    units = units.gather(-1, order)
    needed = (units.sum(-1, keepdim=True).double() * threshold).ceil().long()
    kept = units.cumsum(-1) - units < needed  # until the blocks before this one reach the threshold
    kept |= always.gather(-1, order)
    return (torch.zeros_like(kept).scatter(-1, order, kept) | everything) & allowed


def select_blocks(
    pattern: BlockSparse,
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    *,
    route: Tensor | None = None,
    mode: int = 1,
    q_begin: Tensor | None = None,
    q_end: Tensor | None = None,
    kv_begin: Tensor | None = None,
    kv_end: Tensor | None = None,
    page_table: Tensor | None = None,
) -> BlockSparse:
    """As :func:`flux_ext.operators.select_blocks`, one KV head of one sequence after the other."""
    if pattern.blocks is not None:
        return pattern
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    capacity = k.shape[-3] if page_table is None else page_table.shape[-1] * k.shape[1]
    heads = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else k.shape[-2]
    batch = q.shape[0] if q.dim() == 4 else len(q_begin) - (q_end is None)  # type: ignore[arg-type]
    shape = (batch, heads, -(-q.shape[-3] // Q_BLOCK), max(-(-capacity // pattern.width), 1))
    blocks = torch.zeros(shape, dtype=torch.int32, device=q.device)
    counts = torch.zeros(shape[:-1], dtype=torch.int32, device=q.device)
    kv = KeyValues(k, k, kv_begin, kv_end, page_table)
    for b, h, _, queries, keys, _ in _sequence_heads(q, kv, q_begin, q_end):
        if pattern.threshold is not None:
            if route is not None and _entry(route, b, h, 0) != mode:
                continue
            scores = antidiagonal_scores(queries, keys, scale, pattern.stride, pattern.width)
            kept = keep_mass(scores, pattern.threshold, len(queries), len(keys), pattern.width)
        else:
            mask = dense_mask(pattern, len(queries), len(keys), q.device)  # a block is kept if some pair of it is seen
            kept = torch.stack([part.any(0) for part in mask.split(Q_BLOCK)]) if len(mask) else mask
            kept = F.pad(kept, (0, -len(keys) % pattern.width)).unflatten(1, (-1, pattern.width)).any(2)
        for i, row in enumerate(kept):
            found = row.nonzero()[:, 0]
            blocks[b, h, i, : len(found)] = found.int()
            counts[b, h, i] = len(found)
    return BlockSparse(blocks=blocks, counts=counts, width=pattern.width)


def _place(page: int, sink_pages: int, ring: int) -> int:
    """Where page ``page`` of a sequence lies among those of its sequence head: the sink's stay, the others go round."""
    return page if page < sink_pages else sink_pages + (page - sink_pages) % ring


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
    active: Tensor | None = None,
) -> None:
    """As :func:`flux_ext.operators.append`, one sequence head and one page after the other.

    Window, gap and places of pages are written out once more here, on purpose: tests compare the others with these.
    """
    page_size, max_pages = k_pool.shape[1], page_table.shape[2]
    sink_pages = -(-pattern.sink // page_size)
    unit = math.lcm(pattern.align, page_size)
    for b, h in product(range(k.shape[0]), range(k.shape[1])):
        state = 1 if active is None else int(active[b])
        if state == 0:
            continue
        first, pages = int(base[b, h]), int(ring[b, h])
        trusted = state == 1 and int(seen[b, h]) < max_cache_len
        position = min(int(seen[b, h]), max_cache_len - 1)
        gap = 0
        if sink_pages + pages < max_pages:
            window_begin = pattern.align * (position // pattern.align + 1) - pattern.window
            gap = max(window_begin - sink_pages * page_size, 0) // unit * unit
        page = first + _place(position // page_size, sink_pages, pages)
        k_pool[page, position % page_size, 0] = k[b, h, 0] if trusted else math.nan
        v_pool[page, position % page_size, 0] = v[b, h, 0] if trusted else math.nan
        kv_len[b, h] = position + 1 - gap
        for i in range(-(-int(kv_len[b, h]) // page_size)):
            page = i if i < sink_pages else i + gap // page_size
            page_table[b, h, i] = first + _place(page, sink_pages, pages)
        seen[b, h] += 1
    slots += 1


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
    """As :func:`flux_ext.attention`, by one dense mask after the other."""
    kv, q_begin, q_end = bound_rows(q, k, v, cu_seqlens, seq_start, seq_end, kv_len, page_table)
    routing = Routing(route, full, sparse)
    return attend_or_mix(attend, mix, q, kv, routing, scale, q_begin, q_end, return_lse)


def pool(x: Tensor, pool_size: int, per_head: bool) -> Tensor:
    """Mean over the first and the last ``pool_size`` rows of one sequence ``[S, H, D]``, in fp32 or better.

    Shorter sequences: the two windows overlap and the overlap counts twice, as published. An empty sequence
    pools to zero. Returns ``[H, D]``, or ``[D]`` averaged over the heads too.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = torch.cat([x[:pool_size], x[-pool_size:]])
    pooled = rows.mean(0) if len(rows) else x.new_zeros(x.shape[1:])
    return pooled if per_head else pooled.mean(0)


def route_logits(pooled: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The routers' two MLPs: ``pooled [..., D] -> logits [..., 2]``; weights ``(w1, b1, ..., w5, b5)``."""
    w = [t.to(pooled.dtype) for t in weights]
    hidden = F.linear(F.silu(F.linear(pooled, w[0], w[1])), w[2], w[3])  # encoder
    hidden = F.silu(F.linear(hidden, w[4], w[5]))  # classifier
    hidden = F.silu(F.linear(hidden, w[6], w[7]))
    return F.linear(hidden, w[8], w[9])


def decide(logits: Tensor) -> Tensor:
    """0 (full) where ``logits[..., 1] > logits[..., 0]`` or either is not finite, else 1 (sparse). int32."""
    return ((logits[..., 0] >= logits[..., 1]) & logits.isfinite().all(-1)).to(torch.int32)


def pool_sequences(
    x: Tensor, pool_size: int, per_head: bool, begin: Tensor | None = None, end: Tensor | None = None
) -> Tensor:
    """:func:`pool` of every sequence, ``[B, D]`` (per head ``[B, H, D]``); arguments as for :func:`route`."""
    batch = len(begin) if x.dim() == 3 else x.shape[0]  # type: ignore[arg-type]
    pooled = []
    for b in range(batch):
        rows = x if x.dim() == 3 else x[b]
        first = 0 if begin is None else int(begin[b])
        last = rows.shape[0] if end is None else int(end[b])
        pooled.append(pool(rows[first:last], pool_size, per_head))
    return torch.stack(pooled)


def route(
    x: Tensor,
    weights: Sequence[Tensor],
    pool_size: int,
    per_head: bool,
    begin: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool, both MLPs, decision (arXiv 2604.07394, section 3; per head arXiv 2601.17367).

    Args:
        x: ``[B, S, H, D]``, or packed ``[T, H, D]`` with ``begin`` and ``end``.
        weights: ``(w1, b1, ..., w5, b5)``.
        pool_size: rows pooled at either end of a sequence.
        per_head: decide for every head, not once per sequence.
        begin, end: ``[B]``, the sequences' rows; None: all.

    Returns:
        logits, fp32 or better, ``[B, 2]`` (per head ``[B, H, 2]``), and the route, int32 ``[B]`` (``[B, H]``).
    """
    logits = route_logits(pool_sequences(x, pool_size, per_head, begin, end), weights)
    return logits, decide(logits)
