"""Prefill cases: dense, streaming, mixed heads and sequences, block lists, short prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from flux_ext import BlockSparse, Full
from flux_ext.operators.block_selection import select_blocks
from flux_ext.operators.pattern_functions import Q_BLOCK
from flux_ext.operators.patterns import Pattern

from . import peers
from .decode import K, M
from .problems import (
    CACHE_BYTES,
    OURS,
    SHARES,
    Group,
    Problem,
    Setting,
    Spec,
    attend,
    attend_backward,
    routes,
    visible_pairs,
)

MIXED_LENGTHS = tuple((128 * K) >> i for i in range(8))
"""Lengths of the eight packed sequences, every second one sparse."""


def states(spec: Spec, setting: Setting, q_len: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v, ``[B, S, H, D]``."""
    q = setting.random(spec.batch, q_len or spec.length, spec.heads, spec.dim)
    k, v = (setting.random(spec.batch, spec.length, spec.kv_heads, spec.dim) for _ in range(2))
    return q, k, v


def visible_flops(spec: Spec, setting: Setting, kind: str | None = None) -> float:
    """``4 * D`` per visible (query head, query, key) triple."""
    full, sparse = (visible_pairs(p, spec.length, spec.length) for p in (Full(), setting.sparse))
    heads = round(SHARES[kind or spec.kind] * spec.kv_heads)
    per_group = heads * sparse + (spec.kv_heads - heads) * full
    return 4.0 * spec.dim * spec.batch * (spec.heads // spec.kv_heads) * per_group


def build_prefill(spec: Spec, setting: Setting) -> Problem:
    """Prompts whose heads are routed by ``kind``. Dense ones beside every dense peer."""
    inputs = [states(spec, setting)]
    route = routes(spec, setting)
    problem = Problem(flops=visible_flops(spec, setting))
    problem.contenders[OURS] = [lambda: attend(*inputs[0], route, setting.sparse)]
    if setting.peers and spec.kind == "dense":
        problem.add(*peers.dense(inputs, True))
    elif setting.peers and spec.kind == "streaming":  # theirs has no sink: a little less work
        calls, missing = peers.optional(inputs, True, setting.sparse.window - 1)
        problem.add({f"{name} (window)": c for name, c in calls.items()}, missing)
    return problem


def build_few(spec: Spec, setting: Setting) -> Problem:
    """A few queries over a cache, as speculative decoding, short turns and chunks of a prompt make them.

    ``kind``: how many queries, and how the heads are routed. Keys and values rotate through more than the L2 cache.
    """
    count, routing = spec.kind.split()
    q_len = min(int(count), spec.length)
    route = routes(spec, setting, routing)
    pairs = [visible_pairs(p, q_len, spec.length) for p in (Full(), setting.sparse)]
    sparse = round(SHARES[routing] * spec.kv_heads)
    visible = sparse * pairs[1] + (spec.kv_heads - sparse) * pairs[0]
    problem = Problem(flops=4.0 * spec.dim * spec.batch * (spec.heads // spec.kv_heads) * visible)
    num_bytes = 4 * spec.batch * spec.length * spec.kv_heads * spec.dim
    sets = 2 if setting.tiny else max(1, min(8, CACHE_BYTES // num_bytes))
    inputs = [states(spec, setting, q_len) for _ in range(sets)]
    problem.contenders[OURS] = [lambda s=s: attend(*s, route, setting.sparse) for s in inputs]
    if routing == "full" and setting.peers:
        calls, missing = peers.optional(inputs, True)
        problem.add(calls, missing)
        if q_len == 1:
            problem.add(*peers.dense(inputs, False))
    return problem


def build_backward(spec: Spec, setting: Setting) -> Problem:
    """The gradients of q, k and v of a prompt: ``10 * D`` FLOPs per visible triple. Dense ones beside SDPA's."""
    q, k, v = states(spec, setting)
    grad = setting.random(*q.shape)
    problem = Problem(flops=2.5 * visible_flops(spec, setting))
    problem.contenders[OURS] = [attend_backward(q, k, v, grad, routes(spec, setting), setting.sparse)]
    if setting.peers and spec.kind == "dense" and setting.device == "cuda":
        problem.add(*peers.dense_backward(q, k, v, grad))
    return problem


def build_sequences(spec: Spec, setting: Setting) -> Problem:
    """Eight sequences, each with a length and a route of its own, packed: one launch, beside eight."""
    scale = spec.length / MIXED_LENGTHS[0]
    lengths = [max(int(n * scale), 8) for n in MIXED_LENGTHS[: spec.batch]]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [lengths[i] for i in order]
    route = setting.int32([i % 2 for i in order])
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    begin, end = setting.int32(starts.tolist()), setting.int32(ends.tolist())
    total = sum(lengths)
    q = setting.random(total, spec.heads, spec.dim)
    k, v = (setting.random(total, spec.kv_heads, spec.dim) for _ in range(2))
    problem = Problem()
    for n, sparse in zip(lengths, route.tolist(), strict=True):
        pairs = visible_pairs(setting.sparse if sparse else Full(), n, n)
        problem.flops += 4.0 * spec.dim * spec.heads * pairs
    call = lambda: attend(q, k, v, route, setting.sparse, (begin, end), begin=begin, end=end)  # noqa: E731
    problem.contenders[OURS] = [call]

    def apart() -> None:
        for i, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            one = (t[None, start:stop] for t in (q, k, v))
            attend(*one, route[i : i + 1], setting.sparse)

    problem.contenders[f"{OURS}, one by one"] = [apart]
    return problem


def build_short(spec: Spec, setting: Setting) -> Problem:
    """The same call with the full and with the sparse route: sparsity that cannot pay must cost nothing."""
    q, k, v = states(spec, setting, 1 if spec.kind == "decode" else None)
    problem = Problem()
    for kind in ("streaming", "half", "full"):
        route = routes(spec, setting, kind)
        name = OURS if kind == "streaming" else f"{OURS}, {kind}"
        problem.contenders[name] = [lambda r=route: attend(q, k, v, r, setting.sparse)]
    return problem


def random_blocks(spec: Spec, setting: Setting, density: float) -> Tensor:
    """Which 128-wide key blocks each block of queries keeps: that share of the causal ones, first and last included.

    Returns:
        bool ``[B, Hkv, n, n]``.
    """
    n = -(-spec.length // Q_BLOCK)
    row = torch.arange(n, device=setting.device)
    counts = torch.maximum((density * (row + 1)).round().long(), (row + 1).clamp(max=2))
    rank = torch.rand(spec.batch, spec.kv_heads, n, n, device=setting.device)
    rank[..., 0] = 2.0
    rank = rank.masked_fill(row[:, None] == row, 3.0).masked_fill(row > row[:, None], -1.0)
    last = (counts - 1).expand_as(rank[..., 0])[..., None]
    return rank >= rank.sort(-1, descending=True).values.gather(-1, last)


def block_problem(spec: Spec, keep: Tensor) -> tuple[BlockSparse, float]:
    """The kept blocks as a pattern, and the FLOPs of what is visible in them."""
    row = torch.arange(keep.shape[-1], device=keep.device)
    counts = keep.sum(-1, dtype=torch.int32).contiguous()
    blocks = torch.where(keep, row, len(row)).sort(-1).values.clamp(max=len(row) - 1).int()
    queries = (spec.length - row * Q_BLOCK).clamp(max=Q_BLOCK)
    pairs = float(((counts - 1) * queries * Q_BLOCK + queries * (queries + 1) // 2).sum())
    return BlockSparse(blocks=blocks, counts=counts), 4.0 * spec.dim * (spec.heads // spec.kv_heads) * pairs


def build_blocks(spec: Spec, setting: Setting) -> Problem:
    """Block lists of a given density beside the full pattern, and what choosing the blocks costs."""
    q, k, v = states(spec, setting)
    pattern, flops = block_problem(spec, random_blocks(spec, setting, float(spec.kind.rstrip("%")) / 100))
    route = setting.int32([1] * spec.batch)
    problem = Problem(flops=flops)
    problem.contenders[OURS] = [lambda: attend(q, k, v, route, pattern)]
    problem.contenders[f"{OURS}, full"] = [lambda: attend(q, k, v, None, pattern)]
    scored = BlockSparse(threshold=0.9)
    problem.contenders[f"{OURS}, choosing blocks"] = [lambda: select_blocks(scored, q, k)]
    return problem


def build_flex(spec: Spec, setting: Setting) -> Problem:
    """FlexAttention on the routes of a mixed prompt or on the lists of a block-sparse one (compiling takes a while)."""
    q, k, v = states(spec, setting)
    group, mixed = spec.heads // spec.kv_heads, spec.kind in SHARES
    pattern: Pattern
    if mixed:
        route, pattern, flops = routes(spec, setting), setting.sparse, visible_flops(spec, setting)
        sink, window, _, _ = pattern.numbers()
    else:
        keep = random_blocks(spec, setting, float(spec.kind.rstrip("%")) / 100)
        route, (pattern, flops) = setting.int32([1] * spec.batch), block_problem(spec, keep)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((j < sink) | (j > i - window) | (route[b, h // group] == 0))

    def listed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & keep[b, h // group, i // Q_BLOCK, j // Q_BLOCK]

    problem = Problem(flops=flops)
    problem.contenders[OURS] = [lambda: attend(q, k, v, route, pattern)]
    if setting.peers:
        problem.contenders |= peers.flex(q, k, v, near if mixed else listed)
    return problem


def build_host(spec: Spec, setting: Setting) -> Problem:
    """What one call costs the host before the GPU has anything to do: matters where no CUDA graph is used."""
    q, k, v = states(spec, setting, 1)
    route = routes(spec, setting)
    problem = Problem()
    problem.host[OURS] = lambda: attend(q, k, v, route, setting.sparse)
    calls, _ = peers.dense([(q, k, v)], False)
    problem.host |= {name: c[0] for name, c in calls.items() if name.startswith("SDPA")}
    return problem


def groups() -> list[Group]:
    """The most important cases of each group first."""
    lengths = (32 * K, 8 * K, 128 * K, 16 * K, 64 * K, 4 * K)
    dense = [Spec("dense", "dense", 1, n) for n in lengths]
    narrow = [Spec("dense-64", "dense", 1, n, dim=64) for n in lengths]
    of_short = ((1, K), (1, 2 * K), (4, 4 * K), (16, K))
    brief = [Spec("dense-short", "dense", b, n, dim=d) for d in (128, 64) for b, n in of_short]
    wide = [Spec("dense-256", "dense", 1, n, 256, 16, 4) for n in (K, 2 * K, 4 * K, 8 * K, 32 * K)]
    streaming = [Spec("streaming", "streaming", 1, n) for n in (128 * K, 32 * K, M, 8 * K)]
    mixed = [Spec("mixed-heads", kind, 1, n) for n in (32 * K, 128 * K, 8 * K) for kind in ("half", "quarter")]
    few = [
        Spec("few-queries", f"{n} {kind}", 1, 32 * K) for kind in ("full", "half") for n in (1, 2, 4, 8, 16, 64, 256)
    ]
    few += [Spec("few-queries", f"{n} full", 1, 128 * K) for n in (8, 16, 64, 256, 2048)]
    few += [Spec("few-queries", f"{n} full", 16, 8 * K) for n in (8, 16, 64, 256)]
    few += [Spec("few-queries", f"{n} half", 1, 128 * K) for n in (16, 2048)]
    short = [Spec("short", "prefill", 1, 128 << i) for i in range(7)]
    short += [Spec("short", "decode", 1, 128 << i) for i in range(0, 7, 2)]
    blocks = [Spec("block-sparse", f"{d}%", 1, 32 * K) for d in (25, 10, 50, 95)]
    backward = [Spec("backward", "dense", 1, n) for n in (32 * K, 4 * K, 16 * K, 8 * K)]
    backward += [Spec("backward", kind, 1, n) for kind in ("streaming", "half") for n in (32 * K, 128 * K)]
    backward += [Spec("backward", "dense", 1, 16 * K, dim=d) for d in (64, 256)]
    flex = [Spec("flex", kind, 1, 32 * K) for kind in ("half", "25%")]
    return [
        Group("dense", dense, build_prefill),
        Group("dense-short", brief, build_prefill),
        Group("dense-256", wide, build_prefill),
        Group("streaming", streaming, build_prefill),
        Group("mixed-heads", mixed, build_prefill),
        Group("mixed-sequences", [Spec("mixed-sequences", "packed", 8, 128 * K)], build_sequences),
        Group("short", short, build_short),
        Group("few-queries", few, build_few),
        Group("dense-64", narrow, build_prefill),
        Group("block-sparse", blocks, build_blocks),
        Group("host", [Spec("host", "half", 1, K)], build_host),
        Group("backward", backward, build_backward),
        Group("flex", flex, build_flex),
    ]
