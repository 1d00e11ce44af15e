"""Which keys a query sees: the patterns that a route chooses between.

Every pattern is causal. A query stands at position ``p = kv_len - q_len + i`` (bottom-right alignment) and
sees key ``j`` when

    j <= p and (j < sink or j >= align * (p // align + 1) - window or p >= kv_len - last_q)

or, for :class:`BlockSparse`, when ``j <= p`` and key block ``j // width`` is listed for its query block. The lists may
come from a function of the lengths (:mod:`flux_ext.operators.pattern_functions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from .arguments import check_devices, check_integer, check_tensors, described, to_float
from .pattern_functions import Q_BLOCK, kept_blocks

UNLIMITED = 1 << 30
"""The window of a pattern without one; ``kUnlimited`` in ``csrc/core/pattern.h``."""

Positions = TypeVar("Positions", int, np.ndarray, Tensor)
"""One position, or many."""


class _Windowed:
    """What :class:`Streaming` and :class:`Triangle` share."""

    sink: int
    window: int
    align: int

    def __post_init__(self) -> None:
        for name in ("sink", "window", "align"):
            check_integer(name, getattr(self, name))
        if self.sink < 0:
            raise ValueError(f"sink must be >= 0, got {self.sink}")
        if self.align < 1:
            raise ValueError(f"align must be >= 1, got {self.align}")
        if self.window < 1 or self.window % self.align:
            raise ValueError(f"window must be a positive multiple of align ({self.align}), got {self.window}")

    def window_begin(self, p: Positions) -> Positions:
        """The first position in the window of a query at position ``p``, negative where the window is not yet full."""
        return self.align * (p // self.align + 1) - self.window


@dataclass(frozen=True)
class Full:
    """Causal attention to every key."""

    def numbers(self) -> tuple[int, int, int, int]:
        """``(sink, window, last_q, align)``, as the operators take them."""
        return (0, UNLIMITED, 0, 1)


@dataclass(frozen=True)
class Streaming(_Windowed):
    """The first ``sink`` keys and the last ``window`` ones, the query's own included.

    Args:
        sink: tokens, >= 0.
        window: tokens, a positive multiple of ``align``.
        align: tokens. Above 1, the queries of one aligned block share one window, that of the block's last query (see
            :meth:`window_begin`): block-aligned streaming, as the published Flux checkpoints were trained with
            (arXiv 2604.07394).

    Raises:
        TypeError: something is not an integer.
        ValueError: a number breaks its rule.
    """

    sink: int = 128
    window: int = 2048
    align: int = 1

    def numbers(self) -> tuple[int, int, int, int]:
        """``(sink, window, last_q, align)``, as the operators take them."""
        return (self.sink, self.window, 0, self.align)


@dataclass(frozen=True)
class Triangle(_Windowed):
    """Streaming, but the last ``last_q`` queries see every earlier key ("TA"; arXiv 2604.07394).

    A decode step of a triangle-routed sequence is a streaming step: use :meth:`decode`.

    Args:
        sink, window, align: tokens, as for :class:`Streaming`.
        last_q: queries, >= 0, counted from the end of the prompt.

    Raises:
        TypeError: something is not an integer.
        ValueError: a number breaks its rule.
    """

    sink: int = 128
    window: int = 2048
    last_q: int = 128
    align: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("last_q", self.last_q)
        if self.last_q < 0:
            raise ValueError(f"last_q must be >= 0, got {self.last_q}")

    def numbers(self) -> tuple[int, int, int, int]:
        """``(sink, window, last_q, align)``, as the operators take them."""
        return (self.sink, self.window, self.last_q, self.align)

    def decode(self) -> Streaming:
        """The pattern of the steps after the prompt."""
        return Streaming(self.sink, self.window, self.align)


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """A list of key blocks per (sequence, KV head, block of 128 queries) ("XA"; XAttention, arXiv 2503.16428).

    Give ``blocks``, a ``threshold`` or a ``name``.

    Args:
        blocks: int32 ``[B, Hkv, q_blocks, max_count]``, contiguous, ascending key block indices, none beyond the
            diagonal; entries from the count on are ignored.
        counts: int32 ``[B, Hkv, q_blocks]``, contiguous, from 0 to ``max_count``; None: every list is full.
        width: keys per block, 128 or 64.
        threshold: keep the smallest set of blocks whose share of the antidiagonal scores reaches this, in (0, 1].
        stride: sub-block size of the antidiagonal scoring, in tokens, 8 or 16.
        name: of a function of the lengths, see :func:`flux_ext.register_pattern`. It may be registered later.

    Raises:
        TypeError: something else where a tensor, a number or a string belongs.
        ValueError: none or several of the three are given, a number breaks its rule, or dtypes, shapes or devices do
            not fit. What stands inside the tensors is checked by the operators.
    """

    blocks: Tensor | None = None
    counts: Tensor | None = None
    width: int = 128
    threshold: float | None = None
    stride: int = 16
    name: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("blocks", "threshold", "name") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"BlockSparse takes one of blocks, threshold and name, got {' and '.join(given) or 'none'}"
            )
        if not isinstance(self.name, (str, type(None))):
            raise TypeError(f"name must be a string, got {described(self.name)}")
        check_integer("width", self.width)
        check_integer("stride", self.stride)
        if self.width not in (64, 128):
            raise ValueError(f"width must be 64 or 128, got {self.width}")
        if self.threshold is not None and not 0.0 < to_float("threshold", self.threshold) <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.stride not in (8, 16):
            raise ValueError(f"stride must be 8 or 16, got {self.stride}")
        self._check_lists()

    def _check_lists(self) -> None:
        if self.blocks is None:
            if self.counts is not None:
                raise ValueError("counts belong to blocks: a threshold and a name find their own")
            return
        check_tensors({"blocks": self.blocks}, {"counts": self.counts})
        check_devices("blocks", self.blocks, counts=self.counts)
        for name, x in (("blocks", self.blocks), ("counts", self.counts)):
            if x is not None and x.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {x.dtype}")
        if self.blocks.dim() != 4:
            raise ValueError(f"blocks must be [B, Hkv, q_blocks, max_count], got {list(self.blocks.shape)}")
        if self.counts is not None and self.counts.shape != self.blocks.shape[:-1]:
            raise ValueError(
                f"counts must be [B, Hkv, q_blocks], the shape of blocks {list(self.blocks.shape)} without the last "
                f"dimension, got {list(self.counts.shape)}"
            )

    def numbers(self) -> tuple[int, int, int, int]:
        """``(sink, window, last_q, align)``, as the operators take them: the lists decide, not these."""
        return (0, UNLIMITED, 0, 1)

    def full_counts(self) -> Tensor:
        """``counts``, or the length of the lists where none were given."""
        assert self.blocks is not None
        if self.counts is not None:
            return self.counts
        shape = self.blocks.shape
        return torch.full(shape[:-1], shape[-1], dtype=torch.int32, device=self.blocks.device)


Pattern: TypeAlias = Full | Streaming | Triangle | BlockSparse
PATTERNS = get_args(Pattern)


def dense_mask(pattern: Pattern, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Tensor:
    """The pattern as a boolean mask ``[q_len, kv_len]`` (given block lists: ``[B, Hkv, q_len, kv_len]``).

    The obvious definition that everything else is tested against.

    Raises:
        ValueError: a :class:`BlockSparse` with a threshold, which has no lists yet.
    """
    p = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    j = torch.arange(kv_len, device=device)[None, :]
    causal = j <= p
    if isinstance(pattern, BlockSparse):
        rows = torch.arange(q_len, device=device) // Q_BLOCK
        columns = torch.arange(kv_len, device=device) // pattern.width
        if pattern.name is not None:
            if not q_len or not kv_len:
                return causal
            return kept_blocks(pattern.name, q_len, kv_len, pattern.width, causal.device)[rows][:, columns] & causal
        if pattern.blocks is None:
            raise ValueError("a BlockSparse with a threshold has no mask before its queries are known")
        lists = pattern.blocks.to(device).long()
        counts = pattern.counts
        used = torch.arange(lists.shape[-1], device=device)
        keep = used < counts.to(device)[..., None] if counts is not None else torch.ones_like(lists, dtype=torch.bool)
        num_blocks = -(-kv_len // pattern.width)
        chosen = torch.zeros(*lists.shape[:-1], num_blocks + 1, dtype=torch.bool, device=device)
        chosen.scatter_(-1, torch.where(keep, lists, num_blocks), True)
        return chosen[:, :, rows][..., columns] & causal
    if isinstance(pattern, Full):
        return causal
    last_q = pattern.last_q if isinstance(pattern, Triangle) else 0
    return causal & ((j < pattern.sink) | (j >= pattern.window_begin(p)) | (p >= kv_len - last_q))
