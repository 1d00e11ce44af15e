"""The attention problems that benchmarks time, and the work that is visible in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flux_ext import Full, Streaming

from .cuda.problems import visible_pairs

SPARSE = Streaming(sink=128, window=2048)


@dataclass(frozen=True)
class Case:
    """One attention problem. ``stage``: ``prefill`` (q_len = kv_len), ``decode`` (q_len = 1) or ``backward``."""

    stage: str
    pattern: str  # "full" or "streaming"
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    num_q_heads: int = 8
    num_kv_heads: int = 2
    batch: int = 1

    @property
    def q_len(self) -> int:
        return 1 if self.stage == "decode" else self.kv_len

    def visible_pairs(self) -> int:
        """(query, key) pairs one query head sees."""
        return visible_pairs(SPARSE if self.pattern == "streaming" else Full(), self.q_len, self.kv_len)

    def flops(self) -> float:
        """``4 * D`` per visible (query head, query, key) triple forward, ``10 * D`` backward."""
        per_pair = 10 if self.stage == "backward" else 4
        return float(per_pair * self.head_dim * self.batch * self.num_q_heads * self.visible_pairs())

    def route(self) -> Tensor:
        return torch.full((self.batch,), int(self.pattern == "streaming"), dtype=torch.int32)

    def states(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v, ``[B, S, H, D]``."""
        heads = ((self.q_len, self.num_q_heads), (self.kv_len, self.num_kv_heads), (self.kv_len, self.num_kv_heads))
        q, k, v = (torch.randn(self.batch, n, h, self.head_dim, device=device).to(self.dtype) for n, h in heads)
        return q, k, v
