"""Decode and router cases: bound by bytes or by latency."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flux_ext import operators
from flux_ext.caches.layout import PageLayout
from flux_ext.routers.modules import HeadRouter, LayerRouter, Router

from . import peers
from .measure import Call
from .problems import CACHE_BYTES, OURS, SHARES, Group, Problem, Setting, Spec, attend, routes

PAGE_SIZE = 64
ROUTERS = 32  # as many layers as a model has, each with weights and states of its own


def visible_bytes(spec: Spec, setting: Setting, kind: str | None = None) -> float:
    """Bytes of keys and values that one call reads."""
    sparse = round(SHARES[kind or spec.kind] * spec.kv_heads)
    rows = sparse * min(spec.length, setting.visible) + (spec.kv_heads - sparse) * spec.length
    return 2.0 * spec.batch * rows * spec.dim * setting.dtype.itemsize


def kv_sets(spec: Spec, setting: Setting, count: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` pairs of k and v ``[B, n, Hkv, D]``, views of one buffer each, ``step`` rows apart.

    Where only sink and window are read, a small step suffices: other sets read other rows.
    """
    rows = spec.length + (count - 1) * step
    k, v = (setting.random(spec.batch, rows, spec.kv_heads, spec.dim) for _ in range(2))
    return [(k[:, i * step :][:, : spec.length], v[:, i * step :][:, : spec.length]) for i in range(count)]


def _paged(spec: Spec, setting: Setting, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Pools of keys and values, and ``count`` page tables into them with pages in random order."""
    pages = -(-spec.length // PAGE_SIZE)
    total = count * spec.batch * pages
    k, v = (setting.random(total, PAGE_SIZE, spec.kv_heads, spec.dim) for _ in range(2))
    order = torch.randperm(total, device=setting.device).to(torch.int32)
    return k, v, list(order.view(count, spec.batch, pages))


def build_decode(spec: Spec, setting: Setting) -> Problem:
    """One query per sequence over ``length`` keys."""
    num_bytes = visible_bytes(spec, setting)
    count = 2 if setting.tiny else max(1, min(24, math.ceil(CACHE_BYTES / num_bytes)))
    route = routes(spec, setting)
    queries = [setting.random(spec.batch, 1, spec.heads, spec.dim) for _ in range(count)]
    problem = Problem(num_bytes=num_bytes)
    if spec.layout == "paged":
        k, v, tables = _paged(spec, setting, count)
        kv_len = setting.int32([spec.length] * spec.batch)
        problem.contenders[OURS] = [
            lambda q=q, t=t: attend(q, k, v, route, setting.sparse, end=kv_len, page_table=t)
            for q, t in zip(queries, tables, strict=True)
        ]
        if spec.kind == "full" and setting.peers:
            problem.add(*peers.paged(queries, k, v, tables, spec.length))
        return problem
    step = min(spec.length, 2 * setting.visible) if spec.kind == "streaming" else spec.length
    sets = kv_sets(spec, setting, count, step)
    inputs = [(q, *kv) for q, kv in zip(queries, sets, strict=True)]
    problem.contenders[OURS] = [lambda s=s: attend(*s, route, setting.sparse) for s in inputs]
    if spec.kind == "full" and setting.peers:
        problem.add(*peers.dense(inputs, False))
    return problem


def build_layers(spec: Spec, setting: Setting) -> Problem:
    """The attention of a whole decode step: 32 layers, ``kind`` of them sparse, in one graph."""
    layers = 4 if setting.tiny else 32
    share = float(spec.kind)
    sparse_layers = {int(i * layers / round(share * layers)) for i in range(round(share * layers))}
    kv = kv_sets(spec, setting, layers, spec.length)
    queries = [setting.random(spec.batch, 1, spec.heads, spec.dim) for _ in range(layers)]
    inputs = [(q, *pair) for q, pair in zip(queries, kv, strict=True)]
    route = [setting.int32([int(i in sparse_layers)] * spec.batch) for i in range(layers)]

    def ours() -> None:
        for s, r in zip(inputs, route, strict=True):
            attend(*s, r, setting.sparse)

    full, sparse = (visible_bytes(spec, setting, kind) for kind in ("full", "streaming"))
    problem = Problem(num_bytes=(layers - len(sparse_layers)) * full + len(sparse_layers) * sparse)
    problem.contenders[OURS] = [ours]
    if share == 0 and setting.peers:
        calls, missing = peers.dense(inputs, False)

        def all_layers(steps: list[Call]) -> None:
            for step in steps:
                step()

        problem.add({name: [lambda steps=list(c): all_layers(steps)] for name, c in calls.items()}, missing)
    return problem


def eager_route(module: Router, x: Tensor) -> Tensor:
    """Pool, MLPs and decision by PyTorch, one sequence length for all."""
    rows = torch.cat([x[:, :100], x[:, -100:]], 1).float().mean(1)
    pooled = (rows if module.per_head else rows.mean(1)).to(x.dtype)
    return module.classifier(module.encoder(pooled)).argmax(-1)


def build_router(spec: Spec, setting: Setting) -> Problem:
    """A router per layer, 32 layers in turn: weights and states are as cold as a model leaves them."""
    count = 2 if setting.tiny else ROUTERS
    kind: type[Router] = {"layer": LayerRouter, "head": HeadRouter}[spec.kind]
    modules = [kind(spec.dim).to(setting.device, setting.dtype).requires_grad_(False) for _ in range(count)]
    heads = spec.kv_heads if kind.per_head else spec.heads
    # Only the first and the last rows are read: 256 rows on, a set reads others.
    buffer = setting.random(spec.batch, spec.length + (count - 1) * 256, heads, spec.dim)
    states = [buffer[:, i * 256 :][:, : spec.length] for i in range(count)]
    problem = Problem()
    problem.contenders[OURS] = [
        lambda x=x, w=m.weights(), m=m: operators.route(x, w, m.pool_size, m.per_head)
        for x, m in zip(states, modules, strict=True)
    ]
    if setting.peers:
        problem.contenders["eager PyTorch"] = [
            lambda x=x, m=m: eager_route(m, x) for x, m in zip(states, modules, strict=True)
        ]
    return problem


def build_append(spec: Spec, setting: Setting) -> Problem:
    """Storing a step's token in a paged cache with fixed addresses; torch's bare copies to known places as the peer."""
    pages = -(-spec.length // PAGE_SIZE) + 1
    rows = spec.batch * spec.kv_heads
    layout = PageLayout(setting.sparse, PAGE_SIZE)
    sink, ring = layout.sink_pages, pages - layout.sink_pages
    if spec.kind == "streaming":
        ring = min(layout.ring_pages(), ring)
    k, v = (setting.random(spec.batch, spec.kv_heads, 1, spec.dim) for _ in range(2))
    pools = [setting.random(rows * (sink + ring), PAGE_SIZE, 1, spec.dim) for _ in range(2)]
    shape = (spec.batch, spec.kv_heads)
    base = torch.arange(rows, device=setting.device, dtype=torch.int32).view(shape) * (sink + ring)
    rings, seen = (torch.full(shape, n, dtype=torch.int32, device=setting.device) for n in (ring, spec.length - 1))
    table = torch.zeros((*shape, pages), dtype=torch.int32, device=setting.device)
    kv_len, slots = torch.zeros_like(base), torch.zeros((), dtype=torch.int64, device=setting.device)
    problem = Problem()
    problem.contenders[OURS] = [
        lambda: operators.append(k, v, *pools, base, rings, table, kv_len, seen, slots, layout.pattern, spec.length)
    ]
    if setting.peers:
        place = base.view(-1).long() * PAGE_SIZE
        flat = [(pool.view(-1, spec.dim), x.view(rows, spec.dim)) for pool, x in zip(pools, (k, v), strict=True)]
        problem.contenders["two index_copy_"] = [lambda: [pool.index_copy_(0, place, x) for pool, x in flat]]
    return problem


K, M = 1024, 1 << 20


def groups() -> list[Group]:
    """The most important cases of each group first."""
    full = [Spec("decode", "full", b, n) for b, n in ((1, 128 * K), (16, 128 * K), (1, 8 * K), (1, 32 * K), (1, M))]
    full += [Spec("decode", "full", b, n) for b in (16, 64) for n in (8 * K, 32 * K)]
    full += [Spec("decode", "full", b, n) for b, n in ((64, 128 * K), (16, M), (16, 2 * K), (64, 2 * K), (4, 32 * K))]
    wide = [
        Spec("decode-wide", "full", b, n, heads=64) for b, n in ((1, 32 * K), (1, 128 * K), (16, 32 * K), (64, 8 * K))
    ]
    paged = [
        Spec("decode-paged", kind, b, n, layout="paged")
        for kind, b, n in (
            ("full", 1, 128 * K), ("full", 16, 32 * K), ("full", 64, 8 * K), ("full", 1, 8 * K), ("half", 1, 128 * K),
            ("streaming", 1, 128 * K),
        )
    ]  # fmt: skip
    streaming = [Spec("decode-streaming", "streaming", 1, n) for n in (8 * K, 128 * K, M)]
    streaming += [Spec("decode-streaming", "streaming", b, 8 * K) for b in (16, 64)]
    mixed = [Spec("decode-mixed", kind, 1, n) for n in (8 * K, 32 * K, 128 * K) for kind in ("half", "quarter")]
    mixed += [Spec("decode-mixed", "half", 16, 32 * K)]
    router = [Spec("router", "layer", 1, n) for n in (512, 8 * K, 128 * K, M)]
    router += [Spec("router", "layer", b, 4 * K) for b in (8, 64)]
    router += [Spec("router", "head", 1, n) for n in (512, 128 * K)]
    router += [Spec("router", "head", b, 4 * K) for b in (8, 64)]
    append = [Spec("append", kind, b, 128 * K) for kind in ("full", "streaming") for b in (1, 16)]
    layers = [Spec("decode-layers", share, 1, 256 * K) for share in ("0", "0.5", "0.75", "0.9")]
    return [
        Group("decode", full, build_decode),
        Group("decode-streaming", streaming, build_decode),
        Group("decode-mixed", mixed, build_decode),
        Group("router", router, build_router),
        Group("decode-paged", paged, build_decode),
        Group("decode-wide", wide, build_decode),
        Group("decode-layers", layers, build_layers),
        Group("append", append, build_append),
    ]
