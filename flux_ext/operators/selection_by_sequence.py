"""Block selection where sequences have bounds: one sequence head after the other, for want of an operator.

Padded, packed and cached sequences begin and end where tensors say; torch code can score them only once their bounds
are known on the host. So this waits for the device, and launches a few kernels per KV head of each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_selection import select_blocks
from .operands import KeyValues
from .patterns import Q_BLOCK, BlockSparse


def select_by_sequence(
    pattern: BlockSparse, q: Tensor, kv: KeyValues, q_begin: Tensor | None, q_end: Tensor | None
) -> BlockSparse:
    """:func:`~flux_ext.operators.block_selection.select_blocks` for each KV head of each sequence.

    Arguments as for ``operators.attend``, their shapes and dtypes checked; rows outside the tensors are left out.
    Returns lists ``[B, Hkv, q_blocks, max_count]``.

    Raises:
        ValueError: a sequence has more queries than keys.
    """
    if q.dim() == 3 and q_end is None and q_begin is not None:  # cu_seqlens
        q_begin, q_end = q_begin[:-1], q_begin[1:]
    k, _, kv_begin, kv_end, table = kv
    if k.dim() == 3 and kv_end is None and kv_begin is not None:
        kv_begin, kv_end = kv_begin[:-1], kv_begin[1:]
    heads = k.shape[-2] if table is None or table.dim() == 2 else table.shape[1]
    batch = q.shape[0] if q.dim() == 4 or q_begin is None else len(q_begin)
    q_rows, capacity = q.shape[-3], k.shape[-3] if table is None else table.shape[-1] * k.shape[1]
    queries, keys = _spans(q_begin, q_end, q_rows, batch, heads), _spans(kv_begin, kv_end, capacity, batch, heads)
    group = q.shape[-2] // heads
    chosen: dict[tuple[int, int], BlockSparse] = {}
    for b in range(batch):
        for h in range(heads):
            rows = slice(*queries[b][h])
            if rows.start == rows.stop:
                continue
            own = (q[rows] if q.dim() == 3 else q[b, rows])[:, h * group : (h + 1) * group]
            chosen[b, h] = select_blocks(pattern, own[None], _keys(k, table, b, h)[slice(*keys[b][h])][None, :, None])
    room = max((x.blocks.shape[-1] for x in chosen.values() if x.blocks is not None), default=1)
    shape = (batch, heads, -(-q_rows // Q_BLOCK))
    blocks = torch.zeros(*shape, max(room, 1), dtype=torch.int32, device=q.device)
    counts = torch.zeros(shape, dtype=torch.int32, device=q.device)
    for (b, h), x in chosen.items():
        assert x.blocks is not None
        _, _, q_blocks, width = x.blocks.shape
        blocks[b, h, :q_blocks, :width] = x.blocks[0, 0]
        counts[b, h, :q_blocks] = x.full_counts()[0, 0]
    return BlockSparse(blocks=blocks, counts=counts, width=pattern.width)


def _spans(begin: Tensor | None, end: Tensor | None, rows: int, batch: int, heads: int) -> list[list[tuple[int, int]]]:
    """Rows ``[begin, end)`` of each KV head of each sequence, cut off at ``rows``."""

    def bound(t: Tensor | None, default: int) -> list[list[int]]:
        t = torch.full((batch,), default) if t is None else t
        t = t if t.dim() == 2 else t[:, None]
        found: list[list[int]] = t.clamp(0, rows).expand(batch, heads).tolist()
        return found

    pairs = zip(bound(begin, 0), bound(end, rows), strict=True)
    return [[(x, max(x, y)) for x, y in zip(*row, strict=True)] for row in pairs]


def _keys(k: Tensor, page_table: Tensor | None, b: int, h: int) -> Tensor:
    """All rows ``[T, D]`` of keys among which those of a sequence head are."""
    if page_table is None:
        return k[:, h] if k.dim() == 3 else k[b, :, h]
    pages = (page_table[b] if page_table.dim() == 2 else page_table[b, h]).long().clamp(0, max(len(k) - 1, 0))
    return k[pages, :, h if k.shape[2] > 1 else 0].flatten(0, 1)
