"""The one matrix of attention cases: every backend runs it, and a new layout or pattern is one line here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flux_ext import BlockSparse, Full, Streaming, Triangle, register_pattern
from flux_ext.operators.patterns import Pattern
from flux_ext.operators.testing import poisoned

FEW = Streaming(1, 3)
"""For prompts of some ten tokens."""
STREAMING = Streaming(sink=5, window=17)
"""Its numbers divide neither each other nor a block nor a page."""
ALIGNED = Streaming(4, 8, align=4)
PUBLISHED = Streaming(128, 2048)
"""Sink and window of the published checkpoints."""


@register_pattern("every third")
def every_third(q_len: int, kv_len: int, width: int, device: torch.device) -> Tensor:
    """A user's own pattern: every third key block, the first among them, and those on the diagonal."""
    key = torch.arange(0, kv_len, width, device=device)
    query = torch.arange(kv_len - q_len, kv_len, 128, device=device)[:, None]
    return (key % (3 * width) == 0) | (key > query - width)


THIRD = BlockSparse(name="every third", width=64)

CACHES = ("cached", "cached_per_head", "paged", "paged_per_head")
"""Layouts of keys; ``packed_`` before one: the queries are packed."""
LAYOUTS = ("batched", "left_padded", "right_padded", "packed", *CACHES, *(f"packed_{x}" for x in CACHES))
STRIDES = ("plain", "heads_first", "sliced")
ROUTES = ("none", "full", "sparse", "sequence", "head")


@dataclass(frozen=True)
class Case:
    """Lengths are per sequence; queries are aligned to the end of the keys."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    layout: str = "batched"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sparse: Pattern = STREAMING
    full: Pattern = field(default_factory=Full)
    route: str = "head"
    strides: str = "plain"
    page_size: int = 16
    scale: float | None = None

    def __str__(self) -> str:
        name = type(self.sparse).__name__.lower()
        listed = isinstance(self.sparse, BlockSparse)
        numbers = str(self.sparse.width) if listed else "x".join(str(n) for n in self.sparse.numbers())
        lens = "_".join(f"{q}of{k}" for q, k in zip(self.q_lens, self.kv_lens, strict=True))
        return (
            f"{self.layout}-{self.strides}-h{self.heads}k{self.kv_heads}d{self.head_dim}-"
            f"{name}{numbers}-{self.route}-{lens}"
        )


def cases(head_dims: tuple[int, ...] = (8, 40, 64, 128)) -> list[Case]:
    """The matrix; ``head_dims`` are the widths that the backend supports."""
    d = head_dims[0]
    ragged = {"q_lens": (33, 1, 64, 0, 127), "kv_lens": (33, 1, 64, 0, 127)}
    return [
        # Layouts, ragged where the layout can be.
        Case((40, 40), (40, 40), "batched", head_dim=d),
        Case((3, 3), (129, 129), "batched", head_dim=d),
        *(Case(layout=x, head_dim=d, **ragged) for x in ("left_padded", "right_padded", "packed")),
        Case((1, 1, 1), (1, 64, 130), "cached", head_dim=d),
        Case((4, 4, 4), (40, 64, 130), "cached", head_dim=d),
        Case((1, 1, 1), (0, 33, 63), "cached_per_head", head_dim=d),
        *(Case((2, 2, 2), (3, 64, 130), "paged", head_dim=d, page_size=p) for p in (1, 16, 128)),
        Case((1, 1), (70, 33), "paged_per_head", head_dim=d),
        # Packed queries over a cache: a whole prompt, decode steps, nothing, a prompt after a cached prefix.
        *(Case((33, 1, 0, 64, 5), (33, 130, 64, 65, 3), f"packed_{x}", head_dim=d) for x in CACHES),
        *(Case((150, 1), (280, 300), f"packed_{x}", head_dim=d, page_size=64) for x in ("cached", "paged")),
        Case((40, 9), (70, 64), "packed_paged", sparse=Triangle(4, 16, last_q=5), head_dim=d),
        # Lengths around a block, and more queries than keys.
        *(Case((n,), (n,), head_dim=d) for n in (0, 1, 63, 64, 65, 127, 128, 129)),
        *(Case((9,), (n,), head_dim=d) for n in (9, 200)),
        *(Case((9,), (n,), "cached", head_dim=d) for n in (0, 4)),
        Case(layout="batched", head_dim=d, q_lens=(16, 16), kv_lens=(70, 70)),
        # Groups and widths.
        *(Case((50,), (50,), heads=g * 2, kv_heads=2, head_dim=d) for g in (1, 3, 7, 8, 16)),
        *(Case((50, 50), (70, 70), head_dim=x) for x in head_dims),
        # Patterns.
        Case((150,), (150,), sparse=Streaming(0, 1), head_dim=d),
        Case((150,), (150,), sparse=Streaming(3, 64), head_dim=d),
        Case((300,), (300,), sparse=Streaming(32, 64, align=32), head_dim=d),
        Case((130,), (300,), sparse=Streaming(128, 128, align=128), head_dim=d),
        Case((150,), (150,), sparse=Triangle(4, 16, last_q=33), head_dim=d),
        Case((300,), (300,), sparse=Triangle(32, 64, last_q=20, align=32), head_dim=d),
        Case((150,), (150,), full=Streaming(2, 30), sparse=Streaming(1, 4), head_dim=d),
        Case(layout="packed", sparse=Triangle(2, 8, last_q=9), head_dim=d, **ragged),
        *(Case((300, 1, 0, 257), (300, 1, 0, 257), x, sparse=THIRD, head_dim=d) for x in LAYOUTS[1:4]),
        *(Case((140, 1, 130), (400, 300, 129), x, sparse=THIRD, head_dim=d) for x in LAYOUTS[8:]),
        *(Case((140, 140), (400, 300), x, sparse=THIRD, full=THIRD, head_dim=d) for x in CACHES),
        Case((400,), (400,), sparse=BlockSparse(name="every third"), head_dim=d),
        # Routes, strides, scale.
        *(Case((60, 60), (60, 60), route=r, head_dim=d) for r in ROUTES),
        *(Case((60, 60), (60, 60), strides=s, head_dim=d) for s in STRIDES[1:]),
        Case((60,), (60,), scale=0.5, head_dim=d),
    ]


@dataclass
class Inputs:
    """Arguments of ``flux_ext.attention`` for one case."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: Tensor | None
    kwargs: dict[str, Any]

    def cast(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.route, self.kwargs)


def _route(case: Case, generator: torch.Generator) -> Tensor | None:
    batch = len(case.q_lens)
    if case.route == "none":
        return None
    if case.route in ("full", "sparse"):
        return torch.full((batch,), int(case.route == "sparse"), dtype=torch.int32)
    if case.route == "sequence":
        return torch.arange(batch, dtype=torch.int32) % 2
    # Per head: both routes occur in every sequence.
    return (torch.arange(batch)[:, None] + torch.arange(case.kv_heads)[None]).remainder(2).int()


def _restride(x: Tensor, kind: str) -> Tensor:
    """The same values with other strides; the last dimension stays contiguous."""
    if kind == "heads_first" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return x


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs; every row that nothing may read is NaN."""
    g = torch.Generator().manual_seed(seed)
    batch = len(case.q_lens)

    def randn(n: int, heads: int) -> Tensor:
        return torch.randn(n, heads, case.head_dim, generator=g).to(dtype)

    qs = [randn(n, case.heads) for n in case.q_lens]
    ks = [randn(n, case.kv_heads) for n in case.kv_lens]
    vs = [randn(n, case.kv_heads) for n in case.kv_lens]
    kwargs: dict[str, Any] = {"sparse": case.sparse, "full": case.full, "scale": case.scale}
    lens = torch.tensor(case.kv_lens, dtype=torch.int32)
    packed, cache = case.layout.startswith("packed"), case.layout.removeprefix("packed_")
    if packed:
        kwargs["cu_seqlens"] = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    if case.layout == "batched":
        q, k, v = torch.stack(qs), torch.stack(ks), torch.stack(vs)
    elif case.layout in ("left_padded", "right_padded"):
        left, size = case.layout == "left_padded", max(case.q_lens) + 3
        starts = [size - n if left else 0 for n in case.q_lens]
        q, k, v = (torch.stack([poisoned(x, size, s) for x, s in zip(xs, starts, strict=True)]) for xs in (qs, ks, vs))
        kwargs["seq_start" if left else "seq_end"] = size - lens if left else lens
    elif case.layout == "packed":
        q, k, v = (poisoned(torch.cat(xs), sum(case.q_lens) + 5) for xs in (qs, ks, vs))
    else:
        q = poisoned(torch.cat(qs), sum(case.q_lens) + 5) if packed else torch.stack(qs)
        kwargs["kv_len"] = lens
        if cache.endswith("per_head"):  # every other head holds one key less
            less = torch.arange(case.kv_heads, dtype=torch.int32) % 2
            kwargs["kv_len"] = (lens[:, None] - less).clamp_min(0)
        if cache.startswith("cached"):
            size = max(case.kv_lens) + 9
            k, v = (torch.stack([poisoned(x, size) for x in xs]) for xs in (ks, vs))
        else:
            k, v, kwargs["page_table"] = _paged(case, ks, vs, cache == "paged_per_head", g)
    route = _route(case, g)
    q, k, v = (_restride(x, case.strides) for x in (q, k, v))

    def move(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    assert batch == len(case.kv_lens)
    return Inputs(
        move(q), move(k), move(v), None if route is None else move(route), {n: move(x) for n, x in kwargs.items()}
    )


def _paged(
    case: Case, ks: list[Tensor], vs: list[Tensor], per_head: bool, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in random order; unused pages, tails of pages and of the page table hold garbage."""
    size = case.page_size
    max_pages = -(-max(case.kv_lens) // size) + 2
    rows = len(ks) * (case.kv_heads if per_head else 1)
    num_pages = rows * max_pages + 3
    order = torch.randperm(num_pages, generator=g).int()
    heads = 1 if per_head else case.kv_heads
    pools = [torch.full((num_pages, size, heads, case.head_dim), torch.nan, dtype=ks[0].dtype) for _ in range(2)]
    table = torch.full((rows, max_pages), 2**30, dtype=torch.int32)
    used = 0
    for row in range(rows):
        b, h = divmod(row, case.kv_heads) if per_head else (row, 0)
        for page in range(-(-case.kv_lens[b] // size)):
            table[row, page] = order[used]
            for pool, xs in zip(pools, (ks, vs), strict=True):
                piece = xs[b][page * size : (page + 1) * size]
                pool[order[used], : len(piece)] = piece[:, h : h + 1] if per_head else piece
            used += 1
    if per_head:
        table = table.view(len(ks), case.kv_heads, max_pages)
    return pools[0], pools[1], table
