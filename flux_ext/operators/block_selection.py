"""Which key blocks a block-sparse pattern keeps: by antidiagonal scores, an operator of ours, or by a user's function.

The schema is in ``csrc/torch/library.cpp``; what is computed, in plain PyTorch, in :mod:`flux_ext.operators.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import call, check_devices, check_tensors, described, to_float
from .autograd import one_by_one
from .pattern_functions import Q_BLOCK, block_list
from .patterns import BlockSparse

_ops = torch.ops.flux_ext


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
    """A :class:`BlockSparse` with a threshold or a name, turned into one with lists for these queries and keys.

    With a name, its function is asked for the lists of each length, see :func:`flux_ext.register_pattern`. Bounds are
    read for that, which on CUDA waits for the device; lists are made whatever the route is, and have room for the
    longest of them.

    With a threshold, by antidiagonal scoring (XAttention, arXiv 2503.16428): in every ``stride x stride`` sub-block of
    the score matrix the scores of the antidiagonal are summed and divided by ``stride``, the sums soft-maxed along the
    strided keys, and added up per pair of a block of 128 queries (and the query heads of a KV head) and a block of
    ``width`` keys. Each query block keeps the fewest key blocks whose share of its mass reaches the threshold; its
    first and its diagonal blocks always. Of equal shares (multiples of 2^-30) the earlier block is kept first. Every
    block up to the diagonal is kept where the threshold is 1, and where the scores of a query block are not finite.
    Nothing is differentiated.

    Queries, keys and bounds as for :func:`flux_ext.operators.attend`. While it runs, each list has room for every key
    block of ``k``; packed rows count as those of each sequence, so that ``B`` sequences of ``T`` rows in all take
    ``B * Hkv * T / 128 * T / width`` entries. On the CPU the lists are then cut to the longest; on CUDA, where its
    length is not read back, and in a compiled graph they stay so. Besides the lists: on CUDA 512 bytes for each key
    block and thread block.

    Args:
        pattern: with a threshold or a name; one that has lists comes back as it is.
        q: ``[B, S, Hq, D]``, or packed ``[T, Hq, D]``.
        k: ``[B, Skv, Hkv, D]``, packed ``[T, Hkv, D]``, or pages.
        scale: of the scores; default ``D ** -0.5``.
        route, mode: int32 ``[B]`` or ``[B, Hkv]``: by a threshold, lists are made where the route is ``mode``,
            elsewhere counts are 0. None: everywhere.
        q_begin, q_end: int32 ``[B]``, see :func:`flux_ext.operators.attend`.
        kv_begin, kv_end, page_table: see :class:`flux_ext.operators.KeyValues`.

    Returns:
        ``blocks`` int32 ``[B, Hkv, q_blocks, max_count]``, 0 from the count on, and ``counts [B, Hkv, q_blocks]``;
        ``q_blocks`` for as many rows as ``q`` has room for, ``max_count`` the longest list's, at least 1 (of a
        threshold, on CUDA and in a compiled graph: as many blocks as ``k`` has room for).

    Raises:
        TypeError: something else where a tensor, a pattern or a number belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value.
    """
    if not isinstance(pattern, BlockSparse):
        raise TypeError(f"pattern must be BlockSparse, got {described(pattern)}")
    if pattern.blocks is not None:
        return pattern
    optional = {
        "route": route,
        "q_begin": q_begin,
        "q_end": q_end,
        "kv_begin": kv_begin,
        "kv_end": kv_end,
        "page_table": page_table,
    }
    check_tensors({"q": q, "k": k}, optional)
    if pattern.name is not None:
        return _by_name(pattern, q, k, (q_begin, q_end, kv_begin, kv_end, page_table))
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else to_float("scale", scale)
    threshold = to_float("threshold", pattern.threshold)
    bounds = (q_begin, q_end, kv_begin, kv_end, page_table)
    arguments = (q.detach(), k.detach(), threshold, pattern.stride, pattern.width, scale, route, mode, *bounds)
    blocks, counts = call(_ops.select_blocks, *arguments)
    if q.device.type == "cpu" and not _traced(q):
        # The operator cannot say how long the lists will be: of packed sequences its lists have room for all rows.
        longest = max(counts.amax().item(), 1) if counts.numel() else 1
        blocks = blocks[..., :longest].contiguous()
    return BlockSparse(blocks=blocks, counts=counts, width=pattern.width)


def _traced(q: Tensor) -> bool:
    """Whether tensors have no values yet, or several (under ``vmap``), as when a graph is made."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or q.is_meta:
        return True
    return type(q) not in (Tensor, torch.nn.Parameter)


Bounds = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""``(q_begin, q_end, kv_begin, kv_end, page_table)``."""


def _sizes(q: Tensor, k: Tensor, bounds: Bounds) -> tuple[int, int, int]:
    """Sequences, KV heads, and rows of keys of a sequence that there is room for."""
    q_begin, q_end, _, _, page_table = bounds
    batch = q.shape[0]
    if q.dim() == 3:  # packed; without bounds, which attention refuses, one sequence
        batch = 1 if q_begin is None else q_begin.shape[0] - int(q_end is None)
    heads = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else k.shape[-2]
    return batch, heads, k.shape[-3] if page_table is None else page_table.shape[-1] * k.shape[1]


def _room(q: Tensor, k: Tensor, width: int, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Lists and counts with room for every block, as operators give them."""
    batch, heads, rows = _sizes(q, k, bounds)
    q_blocks, kv_blocks = -(-q.shape[-3] // Q_BLOCK), torch.sym_max(-(-rows // width), 1)
    counts = q.new_empty((batch, heads, q_blocks), dtype=torch.int32)
    return q.new_empty((batch, heads, q_blocks, kv_blocks), dtype=torch.int32), counts


@torch.library.register_fake("flux_ext::select_blocks")
def _(q, k, threshold, stride, width, scale, route, mode, q_begin, q_end, kv_begin, kv_end, page_table):
    check_devices("q", q, k=k, route=route, q_begin=q_begin, q_end=q_end, kv_begin=kv_begin, kv_len=kv_end)
    check_devices("q", q, page_table=page_table)
    return _room(q, k, width, (q_begin, q_end, kv_begin, kv_end, page_table))


torch.library.register_vmap(_ops.select_blocks.default, one_by_one(_ops.select_blocks.default))


def _by_name(pattern: BlockSparse, q: Tensor, k: Tensor, bounds: Bounds) -> BlockSparse:
    """The lists of a named function. Where tensors have no values yet (or several, under ``vmap``) an operator asks
    for them."""
    assert pattern.name is not None
    for name, x, least in (("q", q, 3), ("k", k, 3), ("page_table", bounds[4], 2)):
        if x is not None and x.dim() not in (least, least + 1):
            raise ValueError(f"{name} must have {least} or {least + 1} dimensions, got {list(x.shape)}")
    q_begin, q_end, kv_begin, kv_end, page_table = bounds
    check_devices("q", q, k=k, q_begin=q_begin, q_end=q_end, kv_begin=kv_begin, kv_len=kv_end, page_table=page_table)
    if _traced(q):
        blocks, counts = _ops.named_blocks(pattern.name, pattern.width, q.detach(), k.detach(), *bounds)
    else:
        blocks, counts = _named_blocks(pattern.name, pattern.width, q, k, bounds)
    return BlockSparse(blocks, counts, pattern.width)


def _named_blocks(name: str, width: int, q: Tensor, k: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Lists int32 ``[B, Hkv, q_blocks, max_count]`` and counts, ``max_count`` the longest list's."""
    q_begin, q_end, kv_begin, kv_end, _ = bounds
    batch, heads, rows = _sizes(q, k, bounds)
    q_lens = _lengths(q_begin, q_end, batch, heads, q.shape[-3])
    kv_lens = _lengths(kv_begin, kv_end, batch, heads, rows)
    q_blocks = -(-q.shape[-3] // Q_BLOCK)
    none = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    lists = {
        pair: block_list(name, *pair, width, q.device) if min(pair) > 0 else none
        for pair in dict.fromkeys(zip(q_lens, kv_lens, strict=True))
    }
    longest = max((blocks.shape[1] for blocks, _ in lists.values()), default=1)
    blocks = torch.zeros(batch * heads, q_blocks, longest, dtype=torch.int32, device=q.device)
    counts = torch.zeros(batch * heads, q_blocks, dtype=torch.int32, device=q.device)
    for i, pair in enumerate(zip(q_lens, kv_lens, strict=True)):
        own, count = lists[pair]
        blocks[i, : len(own), : own.shape[1]] = own
        counts[i, : len(own)] = count
    return blocks.view(batch, heads, q_blocks, longest), counts.view(batch, heads, q_blocks)


def _lengths(begin: Tensor | None, end: Tensor | None, batch: int, heads: int, rows: int) -> list[int]:
    """Of each sequence head: rows between its bounds. Bounds of a wrong shape are left to the operator of attention,
    which refuses them."""
    if begin is not None and end is None and begin.shape == (batch + 1,):  # cu_seqlens
        begin, end = begin[:-1], begin[1:]
    first = torch.zeros(batch, heads, dtype=torch.int64)
    last = torch.full_like(first, rows)
    for to, bound in ((first, begin), (last, end)):
        if bound is not None and bound.shape in ((batch,), (batch, heads)):
            to.copy_(bound[:, None] if bound.dim() == 1 else bound)
    lengths: list[int] = (last.clamp(0, rows) - first.clamp(0, rows)).clamp(min=0).flatten().tolist()
    return lengths


# A compiled graph holds the name alone, so a function may be registered anew; its lists have room for every block.
@torch.library.custom_op(
    "flux_ext::named_blocks",
    mutates_args=(),
    schema="(str name, int width, Tensor q, Tensor k, Tensor? q_begin, Tensor? q_end, Tensor? kv_begin, Tensor? kv_end,"
    " Tensor? page_table) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay would not ask the function
)
def named_blocks(
    name: str,
    width: int,
    q: Tensor,
    k: Tensor,
    q_begin: Tensor | None,
    q_end: Tensor | None,
    kv_begin: Tensor | None,
    kv_end: Tensor | None,
    page_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A named function's lists and counts, as :func:`select_blocks` has them of a threshold."""
    bounds = (q_begin, q_end, kv_begin, kv_end, page_table)
    lists, counts = _named_blocks(name, width, q, k, bounds)
    blocks = _room(q, k, width, bounds)[0].zero_()
    blocks[..., : lists.shape[-1]] = lists
    return blocks, counts


@named_blocks.register_fake
def _(name, width, q, k, q_begin, q_end, kv_begin, kv_end, page_table):
    return _room(q, k, width, (q_begin, q_end, kv_begin, kv_end, page_table))


named_blocks.register_vmap(one_by_one(_ops.named_blocks.default))
