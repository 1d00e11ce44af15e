"""The two nouns of attention: what is attended to (:class:`KeyValues`) and how (:class:`Routing`).

Caches make the first, routers and block selection the second; every attention takes queries and these two. The operator
itself, as torch registers it, takes tensors and numbers: ``operators.attend`` spells them out, and what torch gives
back of a call (to shape functions, gradients and twins) is :class:`AttendArguments`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .patterns import BlockSparse, Pattern, Triangle

_LAYOUT = "(tensors are [B, S, H, D], tokens before heads: q is {}, k {})"


class KeyValues(NamedTuple):
    """What is attended to: keys and values, and which of their rows belong to each sequence.

    Attributes:
        k, v: ``[B, Skv, Hkv, D]``; packed ``[T, Hkv, D]``; or pages ``[num_pages, page_size, Hkv, D]``
            (``[num_pages, page_size, 1, D]`` where every head has pages of its own).
        begin, end: int32 ``[B]`` or ``[B, Hkv]``, rows ``[begin, end)`` belong to the sequence; None: from the first,
            to the last. Of packed keys both are needed, or ``cu_seqlens [B + 1]`` as ``begin`` alone. Messages call
            them ``kv_begin`` and ``kv_end`` (``kv_len`` where only the end is given).
        page_table: int32 ``[B, max_pages]`` or ``[B, Hkv, max_pages]``, the pages of each sequence (or head) in order;
            its rows are counted page after page. None: k and v are no pages.
    """

    k: Tensor
    v: Tensor
    begin: Tensor | None = None
    end: Tensor | None = None
    page_table: Tensor | None = None


class Routing(NamedTuple):
    """How it is attended to: the route of each sequence or KV head, and the two patterns it chooses between.

    Attributes:
        route: ``[B]`` or ``[B, Hkv]``, integers or booleans, 0 full and 1 sparse; None: all full.
        full, sparse: what 0 and 1 stand for, see :mod:`flux_ext.operators.patterns`.
    """

    route: Tensor | None
    full: Pattern  # no default: torch 2.11 cannot compile one
    sparse: Pattern


class AttendArguments(NamedTuple):
    """The arguments of ``torch.ops.flux_ext.attend``, in the order and by the names of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor | None
    patterns: list[int]  # of the full pattern, then of the sparse one: numbers() and the width of listed blocks, or 0
    full_blocks: Tensor | None
    full_counts: Tensor | None
    sparse_blocks: Tensor | None
    sparse_counts: Tensor | None
    scale: float
    q_begin: Tensor | None
    q_end: Tensor | None
    kv_begin: Tensor | None
    kv_end: Tensor | None
    page_table: Tensor | None

    @property
    def key_values(self) -> KeyValues:
        return KeyValues(self.k, self.v, self.kv_begin, self.kv_end, self.page_table)

    @property
    def routing(self) -> Routing:
        full = _pattern(self.patterns[:5], self.full_blocks, self.full_counts)
        return Routing(self.route, full, _pattern(self.patterns[5:], self.sparse_blocks, self.sparse_counts))


def _pattern(numbers: list[int], blocks: Tensor | None, counts: Tensor | None) -> Pattern:
    """A pattern from what the operator takes; full and streaming ones are triangles too, with other numbers."""
    sink, window, last_q, align, width = numbers
    return Triangle(sink, window, last_q, align) if blocks is None else BlockSparse(blocks, counts, width)


def bound_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    kv_len: Tensor | None,
    page_table: Tensor | None,
) -> tuple[KeyValues, Tensor | None, Tensor | None]:
    """``(kv, q_begin, q_end)`` of ``operators.attend``, from the arguments of :func:`flux_ext.attention`.

    Where the rows of packed sequences follow each other, ``cu_seqlens`` stands in the place of the first bound, and
    there is no second.

    Raises:
        ValueError: they contradict each other, or a shape or dtype is wrong.
    """
    if q.is_nested or k.is_nested:
        raise ValueError("q and k must be dense tensors, got a nested one: pack its sequences, with cu_seqlens")
    q_shape, k_shape = q.shape, k.shape
    if len(q_shape) not in (3, 4):
        raise ValueError(f"q must be [B, S, Hq, D], or packed [T, Hq, D], got {list(q_shape)}")
    if len(k_shape) not in (3, 4):
        rule = "k must be [B, Skv, Hkv, D], packed [T, Hkv, D] or pages [num_pages, page_size, Hkv or 1, D]"
        raise ValueError(f"{rule}, got {list(k_shape)}")
    padded = seq_start is not None or seq_end is not None
    if padded and (cu_seqlens is not None or kv_len is not None):
        raise ValueError("seq_start and seq_end bound the rows of q, k and v alike: they exclude cu_seqlens and kv_len")
    if page_table is not None and kv_len is None:
        raise ValueError("page_table needs kv_len")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2):
        raise ValueError(f"cu_seqlens must be [B + 1] with B >= 1, got shape {list(cu_seqlens.shape)}")
    if (cu_seqlens is not None) != (len(q_shape) == 3):
        raise ValueError(
            f"cu_seqlens goes with a packed q [T, Hq, D], got q of shape {list(q_shape)} "
            f"{'with' if cu_seqlens is not None else 'without'} cu_seqlens"
        )
    if padded:
        for name, bounds in (("seq_start", seq_start), ("seq_end", seq_end)):
            if bounds is not None and bounds.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {bounds.dtype}")
        if k_shape[-3] != q_shape[-3]:
            raise ValueError(
                f"seq_start and seq_end bound the rows of q and k alike: k must have the {q_shape[-3]} rows of q, "
                f"got {k_shape[-3]} {_LAYOUT.format(list(q_shape), list(k_shape))}"
            )
        return KeyValues(k, v, seq_start, seq_end), seq_start, seq_end
    if cu_seqlens is None:
        if kv_len is None and len(k_shape) == 4 and q_shape[1] > k_shape[1]:
            raise ValueError(
                f"without kv_len or cu_seqlens q must have no more rows than k, got {q_shape[1]} and {k_shape[1]} "
                f"{_LAYOUT.format(list(q_shape), list(k_shape))}"
            )
        return KeyValues(k, v, None, kv_len, page_table), None, None
    if len(k_shape) != 3:  # a cache
        return KeyValues(k, v, None, kv_len, page_table), cu_seqlens, None
    if kv_len is not None:
        raise ValueError(
            "kv_len bounds a cache [B, Skv, Hkv, D] or pages, a packed k is bounded by cu_seqlens: "
            f"got both and k of shape {list(k_shape)}"
        )
    if k_shape[0] != q_shape[0]:
        raise ValueError(
            f"cu_seqlens bounds the rows of a packed q and k alike: k must have the {q_shape[0]} rows of q, "
            f"got {k_shape[0]} (packed tensors are [T, H, D]: q is {list(q_shape)}, k {list(k_shape)})"
        )
    return KeyValues(k, v, cu_seqlens), cu_seqlens, None
