"""Which key blocks a block-sparse pattern keeps: antidiagonal scoring (XAttention, arXiv 2503.16428).

In every ``stride x stride`` sub-block of the score matrix only the antidiagonal is summed, which touches every row and
every column once; the sums, soft-maxed along the strided keys, estimate how much of a query block's attention
falls into each key block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .patterns import Q_BLOCK, BlockSparse


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int, width: int) -> Tensor:
    """Estimated attention mass of each (128-query block, key block) pair.

    Args:
        q: ``[B, S, Hq, D]``; k: ``[B, Skv, Hkv, D]``, the queries aligned to the end of the keys.
        stride: sub-block size; divides ``width`` and 128.
        width: keys per block.

    Returns:
        fp32 ``[B, Hkv, q_blocks, kv_blocks]``: the mean over the group's query heads of the soft-maxed
        antidiagonal sums, scaled by ``1 / (sqrt(D) * stride)``; 0 beyond the diagonal.

    Raises:
        ValueError: more queries than keys.
    """
    _, q_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[1], k.shape[2]
    offset = kv_len - q_len
    if offset < 0:
        raise ValueError(f"block selection needs no more queries ({q_len}) than keys ({kv_len})")
    # The sum over an antidiagonal, where query a of a sub-block meets key stride - 1 - a, is one dot product of length
    # stride * D: of the sub-block's queries in reverse with its keys.
    rows = F.pad(q, (0, 0, 0, 0, 0, -q_len % stride)).unflatten(1, (-1, stride)).flip(2)
    columns = F.pad(k, (0, 0, 0, 0, 0, -kv_len % stride)).unflatten(1, (-1, stride))
    rows = rows.permute(0, 3, 1, 2, 4).flatten(3)  # [B, Hq, S / stride, stride * D]
    columns = columns.permute(0, 3, 1, 2, 4).flatten(3).repeat_interleave(heads // kv_heads, 1)
    scores = (rows @ columns.transpose(-1, -2)).float() / (math.sqrt(dim) * stride)
    last = offset + (torch.arange(rows.shape[2], device=q.device) + 1) * stride - 1
    first_key = torch.arange(columns.shape[2], device=q.device) * stride
    mass = scores.masked_fill(first_key[None] > last[:, None].clamp(max=kv_len - 1), -math.inf).softmax(-1)
    real = torch.arange(rows.shape[2], device=q.device) * stride < q_len
    mass = mass * real[:, None]
    per_block = F.pad(mass, (0, -mass.shape[-1] % (width // stride), 0, -mass.shape[-2] % (Q_BLOCK // stride)))
    per_block = per_block.unflatten(-1, (-1, width // stride)).sum(-1)
    per_block = per_block.unflatten(-2, (-1, Q_BLOCK // stride)).sum(-2)
    return per_block.unflatten(1, (kv_heads, -1)).mean(2)


def keep_mass(scores: Tensor, threshold: float, q_len: int, kv_len: int, width: int) -> tuple[Tensor, Tensor]:
    """The smallest set of key blocks per query block whose share of the scores reaches ``threshold``.

    The first block (the sink) and the diagonal ones are always kept.

    Args:
        scores: fp32 ``[B, H, q_blocks, kv_blocks]``, see :func:`antidiagonal_scores`.
        threshold: share of the scores, in (0, 1].
        q_len, kv_len: tokens, the queries aligned to the end of the keys.
        width: keys per block.

    Returns:
        int32 ``blocks [B, H, q_blocks, kv_blocks]``, ascending, and ``counts [B, H, q_blocks]``.
    """
    q_blocks, kv_blocks = scores.shape[-2:]
    device = scores.device
    ends = (torch.arange(q_blocks, device=device) + 1).mul(Q_BLOCK).clamp(max=q_len) + kv_len - q_len
    begins = torch.arange(q_blocks, device=device) * Q_BLOCK + kv_len - q_len
    index = torch.arange(kv_blocks, device=device)
    allowed = index * width < ends[:, None]
    diagonal = allowed & ((index + 1) * width > begins[:, None])
    always = diagonal | (index == 0)
    scores = scores.masked_fill(~allowed, 0)
    share = scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)
    order = torch.sort(share.masked_fill(always, math.inf), dim=-1, descending=True, stable=True).indices
    mass = share.gather(-1, order)
    needed = mass.cumsum(-1) - mass < threshold  # until the blocks before this one reach the threshold
    needed |= always.expand_as(share).gather(-1, order)
    keep = torch.zeros_like(needed).scatter(-1, order, needed) & allowed
    counts = keep.sum(-1, dtype=torch.int32)
    blocks = torch.where(keep, index, kv_blocks).sort(-1).values
    return blocks.clamp(max=max(kv_blocks - 1, 0)).int().contiguous(), counts.contiguous()


def select_blocks(pattern: BlockSparse, q: Tensor, k: Tensor) -> BlockSparse:
    """A :class:`BlockSparse` with a threshold, turned into one with lists for these queries and keys.

    ``q [B, S, Hq, D]``, ``k [B, Skv, Hkv, D]``; a pattern that has lists comes back as it is.
    """
    if pattern.threshold is None:
        return pattern
    if q.shape[1] == 0:
        empty = torch.zeros(q.shape[0], k.shape[2], 0, 0, dtype=torch.int32, device=q.device)
        return BlockSparse(blocks=empty, counts=empty[..., 0], width=pattern.width)
    scores = antidiagonal_scores(q.detach(), k.detach(), pattern.stride, pattern.width)
    blocks, counts = keep_mass(scores, pattern.threshold, q.shape[1], k.shape[1], pattern.width)
    return BlockSparse(blocks=blocks, counts=counts, width=pattern.width)
