"""Masks and schedules of csrc/core as NumPy arrays (``csrc/python/bindings.cpp``)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Pattern = Sequence[int]
"""Four integers, ``(sink, window, last_q, align)``."""

def mask(pattern: _Pattern, q_len: int, kv_len: int) -> NDArray[np.bool_]:
    """Which keys each query sees: ``[q_len, kv_len]``."""

def plan(
    q_len: NDArray[np.int32],
    kv_len: NDArray[np.int32],
    route: NDArray[np.int32],
    group: int,
    full: _Pattern,
    sparse: _Pattern,
    q_tokens: int,
    kv_block: int,
    num_workers: int,
) -> NDArray[np.int32]:
    """Who does what, ``[pieces, 7]``: worker, sequence, KV head, the tile's first query row, the first key block of the
    piece, one past its last, and all key blocks of the tile."""

def isa() -> str:
    """The instruction set that the CPU kernels use here."""
