"""Which key blocks a block-sparse pattern keeps: the operator and its shape function.

The schema is in ``csrc/torch/library.cpp``; what is computed, in plain PyTorch, in :mod:`flux_ext.operators.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import call, check_devices, check_tensors, described, to_float
from .autograd import one_by_one
from .patterns import Q_BLOCK, BlockSparse

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
    """A :class:`BlockSparse` with a threshold, turned into one with lists for these queries and keys.

    Antidiagonal scoring (XAttention, arXiv 2503.16428): in every ``stride x stride`` sub-block of the score matrix the
    scores of the antidiagonal are summed and divided by ``stride``, the sums soft-maxed along the strided keys, and
    added up per pair of a block of 128 queries (and the query heads of a KV head) and a block of ``width`` keys. Each
    query block keeps the fewest key blocks whose share of its mass reaches the threshold; its first and its diagonal
    blocks always. Of equal shares (multiples of 2^-30) the earlier block is kept first. Every block up to the diagonal
    is kept where the threshold is 1, and where the scores of a query block are not finite. Nothing is differentiated.

    Queries, keys and bounds as for :func:`flux_ext.operators.attend`. Memory besides the lists: on CUDA 512 bytes for
    each key block and thread block.

    Args:
        pattern: with a threshold; one that has lists comes back as it is.
        q: ``[B, S, Hq, D]``, or packed ``[T, Hq, D]``.
        k: ``[B, Skv, Hkv, D]``, packed ``[T, Hkv, D]``, or pages.
        scale: of the scores; default ``D ** -0.5``.
        route, mode: int32 ``[B]`` or ``[B, Hkv]``: lists are made where the route is ``mode``, elsewhere counts are 0.
            None: everywhere.
        q_begin, q_end: int32 ``[B]``, see :func:`flux_ext.operators.attend`.
        kv_begin, kv_end, page_table: see :class:`flux_ext.operators.KeyValues`.

    Returns:
        ``blocks`` int32 ``[B, Hkv, q_blocks, kv_blocks]``, 0 from the count on, and ``counts [B, Hkv, q_blocks]``;
        ``q_blocks`` and ``kv_blocks`` for as many rows as ``q`` and ``k`` have room for.

    Raises:
        TypeError: something else where a tensor, a pattern or a number belongs.
        ValueError: an argument breaks a rule; the message names argument, rule and value.
    """
    if not isinstance(pattern, BlockSparse):
        raise TypeError(f"pattern must be BlockSparse, got {described(pattern)}")
    if pattern.threshold is None:
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
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else to_float("scale", scale)
    threshold = to_float("threshold", pattern.threshold)
    bounds = (q_begin, q_end, kv_begin, kv_end, page_table)
    arguments = (q.detach(), k.detach(), threshold, pattern.stride, pattern.width, scale, route, mode, *bounds)
    blocks, counts = call(_ops.select_blocks, *arguments)
    return BlockSparse(blocks=blocks, counts=counts, width=pattern.width)


@torch.library.register_fake("flux_ext::select_blocks")
def _(q, k, threshold, stride, width, scale, route, mode, q_begin, q_end, kv_begin, kv_end, page_table):
    check_devices("q", q, k=k, route=route, q_begin=q_begin, q_end=q_end, kv_begin=kv_begin, kv_len=kv_end)
    check_devices("q", q, page_table=page_table)
    batch = q.shape[0] if q.dim() == 4 else q_begin.shape[0] - (q_end is None)
    heads = page_table.shape[1] if page_table is not None and page_table.dim() == 3 else k.shape[-2]
    rows = k.shape[-3] if page_table is None else page_table.shape[-1] * k.shape[1]
    q_blocks, kv_blocks = -(-q.shape[-3] // Q_BLOCK), torch.sym_max(-(-rows // width), 1)
    counts = q.new_empty((batch, heads, q_blocks), dtype=torch.int32)
    return q.new_empty((batch, heads, q_blocks, kv_blocks), dtype=torch.int32), counts


torch.library.register_vmap(_ops.select_blocks.default, one_by_one(_ops.select_blocks.default))
