"""Appending to a cache with fixed addresses: bit for bit what the twin does, and what a query sees is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import PUBLISHED
from torch import Tensor

from flux_ext import Full, Streaming, Triangle, operators
from flux_ext.operators import KeyValues, Routing, reference

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
WRITTEN = ("k_pool", "v_pool", "page_table", "kv_len", "seen", "slots")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Case:
    """A cache whose sequences have seen ``seen`` tokens, and how many more come."""

    seen: tuple[int, ...] = (0,)
    steps: int = 40
    routes: tuple[int, ...] = (0, 1)  # per head; the next sequence has them turned by one
    pattern: Streaming = field(default_factory=lambda: Streaming(4, 24))
    page_size: int = 16
    max_cache_len: int = 200
    dim: int = 16
    strides: str = "projected"  # as a model's projections give them; contiguous; sliced: odd and unaligned
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.bfloat16,) * 3  # of k, of v, of the pools

    def __str__(self) -> str:
        p = self.pattern
        heads = f"{'_'.join(map(str, self.seen[:4]))}-h{''.join(map(str, self.routes))}-{self.steps}steps"
        kinds = "_".join(str(d)[6:] for d in self.dtypes)
        return f"{heads}-{p.sink}x{p.window}x{p.align}-p{self.page_size}of{self.max_cache_len}-{self.strides}-{kinds}"


def of_dtypes(k: torch.dtype, v: torch.dtype, pool: torch.dtype, **kwargs: Any) -> Case:
    return Case((0, 30), 8, dtypes=(k, v, pool), **kwargs)


CASES = [
    # Many times round the ring, in one page and in several, from an empty cache.
    Case(steps=190),
    Case(steps=190, pattern=Streaming(0, 1), page_size=1),
    Case(steps=190, pattern=Streaming(3, 5), page_size=3),
    Case((0, 7), steps=150, pattern=Streaming(16, 32, align=8)),
    Case((0, 7), steps=150, pattern=Streaming(8, 24, align=24)),  # neither divides the other
    # Page sizes; lengths around the borders of page and window.
    *(
        Case(
            tuple(max(n + d, 0) for n in (p, 128, 128 + p, 128 + 64, 5 * p) for d in (-1, 0, 1)),
            steps=3,
            pattern=Streaming(128, 64),
            page_size=p,
            max_cache_len=2048,
        )
        for p in (16, 32, 64, 128, 256)
    ),
    *(Case((0, 63, 64, 300), 70, pattern=Streaming(32, 64, align=a), page_size=32, max_cache_len=512) for a in (1, 64)),
    # A cache so short that nothing is dropped, that ends inside a page, that is shorter than the sink.
    Case((0, 3), 30, max_cache_len=33),
    Case((0, 3), 9, pattern=Streaming(100, 16), page_size=4, max_cache_len=13),
    # Tokens beyond the end stay in their own pages.
    Case((47, 49, 50, 51, 1000), 5, max_cache_len=50),
    Case((198, 0, 199), 9),
    # Sequence heads: one, all full, all sparse, many; a page table with more columns than threads.
    Case((5,), 3, routes=(1,)),
    Case((70, 20), 20, routes=(0, 0)),
    Case((70, 20), 20, routes=(1, 1, 1)),
    Case(tuple(range(70)), 2, routes=(0, 1, 1, 0, 1)),
    Case((9000, 33000), 2, pattern=PUBLISHED, max_cache_len=40_000),
    # Widths and strides: 16 bytes at a time and less.
    *(Case((0, 40), 3, dim=d, strides=s) for d in (1, 4, 20, 128, 256) for s in ("projected", "contiguous", "sliced")),
    # Dtypes.
    *(of_dtypes(x, x, x, dim=d) for x in DTYPES for d in (3, 64)),
    *(of_dtypes(x, y, z) for x in DTYPES for y in DTYPES for z in DTYPES if not x == y == z),
]


def random(shape: tuple[int, ...], dtype: torch.dtype, exact: bool) -> Tensor:
    """Any bit pattern, NaN payloads too, where tokens are copied; where they are rounded, anything but NaN."""
    bits = BITS[dtype.itemsize]
    x = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, shape, dtype=bits).view(dtype)
    if exact:
        return x
    x = torch.where(torch.rand(shape) < 0.5, x, torch.randn(shape).to(dtype))
    return torch.where(x.isnan(), torch.tensor(65519.0, dtype=dtype), x)


def tokens(case: Case, which: int, exact: bool | None = None) -> Tensor:
    """``[B, Hkv, 1, D]``, with the strides of the case."""
    dtype, pool = case.dtypes[which], case.dtypes[2]
    batch, heads, dim = len(case.seen), len(case.routes), case.dim
    exact = dtype == pool if exact is None else exact
    if case.strides == "contiguous":
        return random((batch, heads, 1, dim), dtype, exact)
    if case.strides == "sliced":
        return random((batch, heads, 2, dim + 3), dtype, exact)[:, :, 1:, 1:-2]
    return random((batch, 1, heads, dim), dtype, exact).transpose(1, 2)


def cache(case: Case) -> dict[str, Any]:
    """The tensors of a cache, with the shortest rings that are allowed; pools and table hold anything."""
    page_size, pattern = case.page_size, case.pattern
    batch, heads = len(case.seen), len(case.routes)
    max_pages = -(-case.max_cache_len // page_size)
    sink_pages = -(-pattern.sink // page_size)
    window_pages = -(-(pattern.window + math.lcm(pattern.align, page_size) - 1) // page_size)
    sparse = torch.tensor([[case.routes[(h + b) % heads] for h in range(heads)] for b in range(batch)]).bool()
    ring = torch.where(sparse, window_pages, max(max_pages - sink_pages, 1))
    run = (sink_pages + ring).clamp(max=max_pages)
    base = run.view(-1).cumsum(0).view(batch, heads) - run + 1  # page 0 belongs to nobody
    pool = (int(run.sum()) + 2, page_size, 1, case.dim)
    return {
        "k_pool": random(pool, case.dtypes[2], True),
        "v_pool": random(pool, case.dtypes[2], True),
        "base": base.int(),
        "ring": ring.int(),
        "page_table": torch.randint(0, 1 << 30, (batch, heads, max_pages), dtype=torch.int32),
        "kv_len": torch.randint(0, 1 << 30, (batch, heads), dtype=torch.int32),
        "seen": torch.tensor(case.seen, dtype=torch.int32)[:, None].repeat(1, heads),
        "slots": torch.tensor(max(case.seen) + 3),
        "pattern": pattern,
        "max_cache_len": case.max_cache_len,
    }


def to(x: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in x.items()}


def copy_of(x: dict[str, Any]) -> dict[str, Any]:
    return {name: t.clone() if isinstance(t, Tensor) else t for name, t in x.items()}


def assert_same_bits(got: dict[str, Any], want: dict[str, Any], what: str = "") -> None:
    for name in WRITTEN:
        a, b = got[name].cpu(), want[name].cpu()
        if a.is_floating_point():
            a, b = a.view(BITS[a.dtype.itemsize]), b.view(BITS[b.dtype.itemsize])
        assert torch.equal(a, b), f"{name} {what}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_twin(case: Case, device: str) -> None:
    want = cache(case)
    got = to(copy_of(want), device)
    for step in range(case.steps):
        k, v = tokens(case, 0), tokens(case, 1)
        reference.append(k, v, **want)
        # Not a plain .to(device): it would make the strides dense.
        there = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device).copy_(t) for t in (k, v)]
        operators.append(*there, **got)
        assert_same_bits(got, want, f"after step {step}")
        assert torch.equal(got["base"].cpu(), want["base"]) and torch.equal(got["ring"].cpu(), want["ring"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_without_a_token_and_tokens_not_to_be_trusted(dtype: torch.dtype, device: str) -> None:
    """Equal to the twin; and a sequence has what it would have without the steps in which it has no token."""
    case = Case((0, 30, 2, 40), 60, dtypes=(dtype,) * 3)
    want, alone = cache(case), cache(case)
    alone |= copy_of(want)
    got = to(copy_of(want), device)
    for step in range(case.steps):
        k, v = tokens(case, 0), tokens(case, 1)
        active = torch.randint(0, 2, (4,), dtype=torch.int32)
        if step == 20:
            active[1] = -1
        reference.append(k, v, **want, active=active)
        operators.append(k.to(device), v.to(device), **got, active=active.to(device))
        assert_same_bits(got, want, f"after step {step}")
        if active[0]:
            one = {
                name: t[:1] if name in ("base", "ring", "page_table", "kv_len", "seen") else t
                for name, t in alone.items()
            }
            reference.append(k[:1], v[:1], **one)
        if step == 20:
            at = int(want["seen"][1, 0]) - 1  # head 1 of sequence 1 is full: its pages are in order
            run = want["k_pool"][want["base"][1, 1] :].view(-1, case.dim)
            assert run[at].isnan().all() and not run[at - 1].isnan().all()
    assert int(got["slots"]) == int(alone["slots"]) + case.steps - int(alone["seen"][0, 0])
    for name in ("page_table", "kv_len", "seen"):
        assert torch.equal(got[name][0].cpu(), alone[name][0]), name
    pages = alone["page_table"][0, 0, : -(-int(alone["kv_len"][0, 0]) // case.page_size)].long()
    bits = BITS[dtype.itemsize]
    assert torch.equal(got["k_pool"].cpu()[pages].view(bits), alone["k_pool"][pages].view(bits))


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_without_a_place_makes_what_attends_to_it_nan(device: str) -> None:
    """Not text that looks right: attention over a sequence that is full is NaN, over the others what it was."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Case((11, 13), 0, max_cache_len=14, dim=64, dtypes=(dtype,) * 3)
    x = to(cache(case), device)
    x["k_pool"].normal_(), x["v_pool"].normal_()
    q, k = (torch.randn(2, 2, 1, 64, dtype=dtype, device=device) for _ in range(2))
    route = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device)
    for full in (False, True, True):
        operators.append(k, k, **x)
        kv = KeyValues(x["k_pool"], x["v_pool"], end=x["kv_len"], page_table=x["page_table"])
        out, _ = operators.attend(q.transpose(1, 2), kv, Routing(route, Full(), case.pattern), 0.125)
        assert not out[0].isnan().any() and out[1].isnan().all() == full
    assert x["kv_len"].tolist() == [[14, 14], [14, 14]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize(
    "pattern",
    [Streaming(4, 16), Streaming(0, 1), Streaming(32, 32, align=16), Streaming(5, 24, align=12)],
    ids=lambda p: f"{p.sink}x{p.window}x{p.align}",
)
def test_the_table_lists_what_a_query_sees(pattern: Streaming, page_size: int, device: str) -> None:
    """From an empty cache on: every stored token, in order, is the one of its position, and none that is seen lacks."""
    case = Case((0, 0), 0, (0, 1, 1), pattern, page_size, 450, dim=8, dtypes=(torch.float32,) * 3)
    x = to(cache(case), device)
    offset = torch.arange(6, dtype=torch.float32, device=device).view(2, 3) * 1000
    sink, unit = -(-pattern.sink // page_size) * page_size, math.lcm(pattern.align, page_size)
    for position in range(450):
        k = (offset + position)[..., None, None].repeat(1, 1, 1, 8)
        operators.append(k, -k, **x)
        window_begin = pattern.window_begin(position)
        for b in range(2):
            for h in range(3):
                n = int(x["kv_len"][b, h])
                pages = x["page_table"][b, h, : -(-n // page_size)].long()
                stored = x["k_pool"][pages].view(-1, 8)[:n] - offset[b, h]
                assert torch.equal(x["v_pool"][pages].view(-1, 8)[:n], -(stored + offset[b, h]))
                gap = position + 1 - n
                assert gap % unit == 0 and gap <= max(window_begin - sink, 0)
                if not case.routes[(h + b) % 3]:
                    assert gap == 0
                else:
                    assert n < sink + pattern.window + unit
                want = [*range(min(sink, position + 1)), *range(sink + gap, position + 1)]
                assert stored[:, 0].tolist() == want and (stored == stored[:, :1]).all()
                assert (k.new_tensor(want) >= max(window_begin, 0)).sum() == position + 1 - max(window_begin, 0)


def test_gradients_stay_out() -> None:
    case = Case()
    x, k = cache(case), tokens(case, 0, exact=False).requires_grad_()
    operators.append(k, k * 2, **x)
    assert not any(x[name].requires_grad for name in WRITTEN)


@pytest.mark.parametrize("device", DEVICES)
def test_in_inference_mode_and_out_again(device: str) -> None:
    case = Case()
    twin = cache(case)
    x = to(copy_of(twin), device)
    for step in range(4):
        k = tokens(case, 0)
        reference.append(k, k, **twin)
        with torch.inference_mode(step % 2 == 0):
            k = k.to(device)
            operators.append(k, k, **x)
    assert_same_bits(x, twin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str, device: str) -> None:
    """What follows in the graph sees what was written, and the caller's tensors are written in place."""
    case = Case((40, 3), pattern=Streaming(16, 32))
    x = to(cache(case), device)
    want = to(copy_of(x), "cpu")

    def step(k: Tensor, x: dict[str, Any]) -> Tensor:
        before = x["slots"] + 0
        operators.append(k, k * 2, **x)
        return x["slots"] - before + x["kv_len"]

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    addresses = {name: x[name].data_ptr() for name in WRITTEN}
    for _ in range(3):
        k = tokens(case, 0, exact=False)
        reference.append(k, k * 2, **want)
        assert torch.equal(compiled(k.to(device), x).cpu(), want["kv_len"] + 1)
        assert_same_bits(x, want)
        assert addresses == {name: x[name].data_ptr() for name in WRITTEN}


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    case = Case((40, 3))
    x = to(cache(case), device)
    k, v = tokens(case, 0, exact=False).to(device), tokens(case, 1, exact=False).to(device)
    x["pattern"] = list(x["pattern"].numbers())
    for active in (None, torch.tensor([1, 0], dtype=torch.int32, device=device)):
        torch.library.opcheck(torch.ops.flux_ext.append.default, (k, v, *x.values(), active))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_in_a_cuda_graph() -> None:
    case = Case((0, 31, 45), routes=(0, 1, 1), pattern=Streaming(16, 32))
    want = cache(case)
    x = to(copy_of(want), "cuda")
    k, v = (torch.empty(3, 3, 1, case.dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operators.append(k, v, **x)
    for step in range(100):
        new = tokens(case, 0), tokens(case, 1)
        reference.append(*new, **want)
        k.copy_(new[0]), v.copy_(new[1])
        graph.replay()
        assert_same_bits(x, want, f"after step {step}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_is_one_kernel_on_a_gpu_and_never_waits() -> None:
    case = Case((40, 3), dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    x = to(cache(case), "cuda")
    k, v = tokens(case, 0).cuda(), tokens(case, 1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                operators.append(k, v, **x)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_device = [e.name for e in events if "sync" not in e.name.lower()]
    assert len(on_device) == 3 and all("append_kernel" in name for name in on_device), on_device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["base", "ring", "seen"])
@pytest.mark.parametrize("value", [-(1 << 31), -1, 0, 1 << 20, (1 << 31) - 1])
def test_wrong_values_on_a_gpu_stay_inside_the_tensors(name: str, value: int) -> None:
    """They are not read back; the pages they lead to are some of the pool's."""
    case = Case((0, 40), 0, dim=8)
    x = to(cache(case), "cuda")
    x[name].fill_(value)
    for _ in range(3):
        k = tokens(case, 0).cuda()
        operators.append(k, k, **x)
    torch.cuda.synchronize()
    assert int(x["kv_len"].min()) >= 1 and int(x["kv_len"].max()) <= case.max_cache_len
    for row in range(4):
        n = int(x["kv_len"].view(-1)[row])
        pages = x["page_table"].view(4, -1)[row, : -(-n // case.page_size)]
        assert int(pages.min()) >= 0 and int(pages.max()) < x["k_pool"].shape[0]


# ---- bad input ----


def good() -> dict[str, Any]:
    case = Case((40, 3), dim=16, dtypes=(torch.float32,) * 3)
    return {"k": tokens(case, 0, exact=False), "v": tokens(case, 1, exact=False), **cache(case)}


def ints(*x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


# What is broken (a value, or a function of the good one), and what the message must say.
BAD: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.randn(2, 2, 16)}, r"k must be one token per sequence and KV head \[B, Hkv, 1, D\], got \[2, 2, 16\]"),
    (
        {"k": torch.randn(2, 2, 2, 16)},
        r"k must be one token per sequence and KV head \[B, Hkv, 1, D\], got \[2, 2, 2, 16\]",
    ),
    ({"v": torch.randn(2, 2, 1, 8)}, r"v must have the shape of k \(\[2, 2, 1, 16\]\), got \[2, 2, 1, 8\]"),
    (
        {x: torch.randn(0, 2, 1, 16) for x in "kv"},
        r"k must have at least one sequence and one KV head, got \[0, 2, 1, 16\]",
    ),
    ({x: torch.randn(2, 2, 1, 264) for x in "kv"}, r"head_dim must be from 1 to 256, got 264"),
    ({"k": torch.randn(2, 2, 1, 16).double()}, r"k must be float16, bfloat16 or float32, got float64"),
    ({"v": torch.randn(2, 2, 1, 16).int()}, r"v must be float16, bfloat16 or float32, got int32"),
    ({"k": torch.randn(2, 2, 1, 32)[..., ::2]}, r"k must have a contiguous last dimension, got stride 2"),
    ({"v": torch.randn(2, 2, 1, 32)[..., ::2]}, r"v must have a contiguous last dimension, got stride 2"),
    ({"v": torch.empty(2, 2, 1, 16, device="meta")}, r"v must be on the device of k \(cpu\), got meta"),
    ({"slots": torch.tensor(0, device="meta")}, r"slots must be on the device of k \(cpu\), got meta"),
    ({"k_pool": lambda t: t[:, :, 0]}, r"k_pool must be \[num_pages, page_size, 1, D\], got \["),
    ({"k_pool": lambda t: t[:0]}, r"k_pool must have at least one page .*, got \[0, 16, 1, 16\]"),
    ({"k_pool": lambda t: t[:, :0]}, r"k_pool must have .* at least one token, got \[\d+, 0, 1, 16\]"),
    ({"k_pool": lambda t: t.double()}, r"k_pool must be float16, bfloat16 or float32, got float64"),
    ({"k_pool": lambda t: t[..., :8].contiguous()}, r"k_pool must be contiguous \[\d+, 16, 1, 16\], got .* 8\]"),
    ({"k_pool": lambda t: t.repeat(1, 2, 1, 1)[:, ::2]}, r"k_pool must be contiguous .*, got other strides"),
    ({"v_pool": lambda t: t[1:]}, r"v_pool must be contiguous \[\d+, 16, 1, 16\], got \[\d+, 16, 1, 16\]"),
    ({"v_pool": lambda t: t.half()}, r"v_pool must be float32, got float16"),
    ({"base": lambda t: t.long()}, r"base must be int32, got int64"),
    ({"base": lambda t: t[:1]}, r"base must be contiguous \[2, 2\], got \[1, 2\]"),
    ({"ring": lambda t: t.T.contiguous().T}, r"ring must be contiguous \[2, 2\], got other strides"),
    ({"page_table": lambda t: t[:, 0]}, r"page_table must be \[B, Hkv, max_pages\], got \[2, 13\]"),
    ({"page_table": lambda t: t[:1]}, r"page_table must be contiguous \[2, 2, 13\], got \[1, 2, 13\]"),
    ({"page_table": lambda t: t.long()}, r"page_table must be int32, got int64"),
    ({"kv_len": lambda t: t[:, 0]}, r"kv_len must be contiguous \[2, 2\], got \[2\]"),
    ({"seen": lambda t: t[:, 0]}, r"seen must be contiguous \[2, 2\], got \[2\]"),
    ({"seen": lambda t: t.long()}, r"seen must be int32, got int64"),
    ({"slots": ints(0)}, r"slots must be int64, got int32"),
    ({"slots": torch.tensor([0])}, r"slots must be contiguous \[\], got \[1\]"),
    ({"active": torch.ones(2)}, r"active must be int32, got float32"),
    ({"active": ints(1)}, r"active must be contiguous \[2\], got \[1\]"),
    (
        {"active": torch.ones(2, dtype=torch.int32, device="meta")},
        r"active must be on the device of k \(cpu\), got meta",
    ),
    ({"active": ints(1, 2)}, r"active must be 1, 0 or -1, got 2 for sequence 1"),
    ({"pattern": Triangle(4, 24, last_q=1)}, r"pattern.last_q must be 0.*, got 1"),
    ({"max_cache_len": 0}, r"max_cache_len must be from 1 to the 208 tokens of the page_table, got 0"),
    ({"max_cache_len": 209}, r"max_cache_len must be from 1 to the 208 tokens of the page_table, got 209"),
    ({"seen": ints([40, 40], [3, -1])}, r"seen must be at least 0, got -1 for sequence 1, head 1"),
    ({"ring": ints([12, 0], [3, 12])}, r"ring must be at least 1, got 0 for sequence 0, head 1"),
    ({"ring": ints([12, 3], [2, 12])}, r"ring must hold .* the window, at least 3, got 2 for sequence 1, head 0"),
    ({"base": lambda t: t - 2}, r"base must be at least 0, got -1 for sequence 0, head 0"),
    ({"base": lambda t: t + 2}, r"base must leave room .*, at most \d+, got \d+ for .* 1, head 1"),
]


@pytest.mark.parametrize(("broken", "message"), BAD, ids=[f"{'-'.join(b)}-{i}" for i, (b, _) in enumerate(BAD)])
def test_refuses(broken: dict[str, Any], message: str) -> None:
    operators.append(**good())
    x = good()
    x |= {name: y(x[name]) if isinstance(y, Callable) else y for name, y in broken.items()}
    before = copy_of(x)
    with pytest.raises(ValueError, match=message):
        operators.append(**x)
    for name in set(WRITTEN) - set(broken):
        assert torch.equal(x[name].nan_to_num(), before[name].nan_to_num()), f"{name} was written"


def test_refuses_a_pattern_of_other_numbers() -> None:
    x = good()
    for pattern, message in (
        ([4, 24, 0], r"pattern must hold 4 integers \(sink, window, last_q, align\), got 3"),
        ([-1, 24, 0, 1], r"pattern.sink must be >= 0, got -1"),
        ([4, 0, 0, 1], r"pattern.window must be a positive multiple of align \(1\), got 0"),
        ([4, 24, 0, 0], r"pattern.align must be >= 1, got 0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):  # which one depends on torch
            torch.ops.flux_ext.append(*[pattern if name == "pattern" else t for name, t in x.items()])
