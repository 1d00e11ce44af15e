"""What is timed: specifications of cases, and what a case becomes on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux_ext import Full, Streaming, operators
from flux_ext.operators import KeyValues, Routing
from flux_ext.operators.patterns import Pattern

from .measure import Call

OURS = "flux_ext"
"""Contenders whose names begin so are ours; every other is a peer."""
CACHE_BYTES = 160 << 20
"""Inputs of memory-bound cases rotate through more than the L2 cache holds."""


@dataclass(frozen=True)
class Spec:
    """One case: a row of the table before it is timed.

    ``kind`` says how heads or sequences are routed ("full", "half", ...), or what else distinguishes the case.
    """

    group: str
    kind: str
    batch: int
    length: int
    dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    layout: str = ""  # "paged", or nothing

    @property
    def label(self) -> str:
        shape = f"{self.batch} x {self.length} d{self.dim} {self.heads}/{self.kv_heads}"
        return " ".join(filter(None, (self.group, self.kind, shape, self.layout)))


@dataclass(frozen=True)
class Setting:
    """Where and how cases run. ``tiny``: everything small, so that all of it runs on a CPU in seconds."""

    device: str = "cuda"
    tiny: bool = False
    peers: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def seconds(self) -> float:
        """Measuring time per case."""
        return 0.02 if self.tiny else 0.6

    @property
    def sparse(self) -> Streaming:
        return Streaming(16, 32) if self.tiny else Streaming(128, 2048)

    @property
    def visible(self) -> int:
        """Keys a streaming decode step sees."""
        return self.sparse.sink + self.sparse.window

    def shrink(self, spec: Spec) -> Spec:
        """A case of the same kind that takes milliseconds on a CPU."""
        if not self.tiny:
            return spec
        blocks = spec.kind.endswith("%")  # several blocks of 128
        length = 300 if blocks else min(max(spec.length // 1024, 40), 400)
        return replace(spec, batch=min(spec.batch, 2), length=length, dim=spec.dim // 4, heads=8, kv_heads=4)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def int32(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass
class Problem:
    """Contenders of one case by name, and the visible work they share (FLOPs for prefill, bytes for decode)."""

    contenders: dict[str, Sequence[Call]] = field(default_factory=dict)
    flops: float = 0.0
    num_bytes: float = 0.0
    host: dict[str, Call] = field(default_factory=dict)  # timed on the host instead
    skipped: dict[str, str] = field(default_factory=dict)  # contenders that cannot run, and why

    def add(self, peers: dict[str, Sequence[Call]], skipped: dict[str, str]) -> None:
        self.contenders |= peers
        self.skipped |= skipped


@dataclass(frozen=True)
class Group:
    """Cases of one kind and how they are built."""

    name: str
    specs: Sequence[Spec]
    build: Callable[[Spec, Setting], Problem]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None,
    sparse: Pattern,
    q_bounds: Sequence[Tensor] = (),
    **of_kv: Tensor,
) -> Tensor:
    """Our operator, causal with hard routes; ``of_kv``: the bounds of k and v, their page table."""
    routing = Routing(route, Full(), sparse)
    return operators.attend(q, KeyValues(k, v, **of_kv), routing, q.shape[-1] ** -0.5, *q_bounds)[0]


def attend_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, route: Tensor, sparse: Pattern) -> Call:
    """Our gradients of such a call, as autograd calls them after a forward pass."""
    patterns, scale = [*Full().numbers(), 0, *sparse.numbers(), 0], q.shape[-1] ** -0.5
    how = (route, patterns, None, None, None, None, scale, None, None, None, None)
    out, lse = torch.ops.flux_ext.attend(q, k, v, *how, None)
    return lambda: torch.ops.flux_ext.attend_backward(grad, q, k, v, out, lse, *how)


SHARES = {"full": 0.0, "dense": 0.0, "quarter": 0.25, "half": 0.5, "streaming": 1.0}
"""Share of the KV heads that are sparse, by kind."""


def routes(spec: Spec, setting: Setting, kind: str | None = None) -> Tensor:
    """int32 ``[B, Hkv]``: the first heads sparse, the others full."""
    sparse = round(SHARES[kind or spec.kind] * spec.kv_heads)
    return setting.int32([[1] * sparse + [0] * (spec.kv_heads - sparse)] * spec.batch)


def visible_pairs(pattern: Full | Streaming, q_len: int, kv_len: int) -> int:
    """(query, key) pairs that the pattern lets one head see."""
    p = torch.arange(kv_len - q_len, kv_len, dtype=torch.int64)
    if isinstance(pattern, Full):
        return int((p + 1).sum())
    begin = pattern.window_begin(p).clamp(min=0)
    return int((p + 1 - begin + begin.clamp(max=pattern.sink)).sum())
