"""The CUDA operators against the reference in fp64, over layouts, patterns, shapes and dtypes."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace

import pytest
import torch
from cases import PUBLISHED, STREAMING

import flux_ext
from flux_ext import BlockSparse, Full, Streaming, Triangle, operators
from flux_ext.operators import KeyValues, Routing, reference
from flux_ext.operators.patterns import Pattern
from flux_ext.routers.modules import LayerRouter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """One call of ``operators.attend``: everything its inputs are made from."""

    q_lens: tuple[int, ...] = (130, 77)
    kv_lens: tuple[int, ...] | None = None  # None: as q_lens
    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    layout: str = "batched"  # batched, left, right, packed, cache, cache_heads, paged, paged_heads
    page_size: int = 16
    route: str = "heads"  # none, sequence, heads
    full: Pattern = field(default_factory=Full)
    sparse: Pattern = field(default_factory=lambda: Streaming(16, 48))
    dtype: torch.dtype = torch.bfloat16
    scale: float | None = None
    odd_strides: bool = False

    def label(self) -> str:
        q, kv = "_".join(map(str, self.q_lens)), "_".join(map(str, self.kv_lens or self.q_lens))
        names = [f"q{q}-kv{kv}-h{self.heads}x{self.kv_heads}-d{self.dim}-{self.layout}-{self.route}"]
        names += [type(self.full).__name__, type(self.sparse).__name__, str(self.dtype)[6:]]
        return "-".join(names)


def random(*shape: int, dtype: torch.dtype, odd: bool = False) -> torch.Tensor:
    if odd:  # rows that start at no multiple of 16 bytes
        return torch.randn(*shape[:-1], shape[-1] + 3, device=DEVICE, dtype=torch.float32).to(dtype)[..., 1:-2]
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make(case: Case) -> dict:
    """Arguments of ``operators.attend``; every row of k and v that no sequence owns is NaN."""
    torch.manual_seed(zlib.crc32(case.label().encode()))
    batch, kv_lens = len(case.q_lens), case.kv_lens or case.q_lens
    make_random = lambda *shape: random(*shape, dtype=case.dtype, odd=case.odd_strides)  # noqa: E731
    bounds: dict = {}  # of q
    owned_kv: dict = {}  # of k and v: their bounds, the page table
    longest_q, longest_kv = max(case.q_lens), max(kv_lens)
    if case.layout == "packed":
        gap = 3  # rows between sequences that belong to none
        q_starts = [sum(case.q_lens[:b]) + b * gap for b in range(batch)]
        kv_starts = [sum(kv_lens[:b]) + b * gap for b in range(batch)]
        q = make_random(q_starts[-1] + case.q_lens[-1] + gap, case.heads, case.dim)
        k, v = (make_random(kv_starts[-1] + kv_lens[-1] + gap, case.kv_heads, case.dim) for _ in range(2))
        owned = torch.zeros(k.shape[0], dtype=torch.bool, device=DEVICE)
        for start, n in zip(kv_starts, kv_lens, strict=True):
            owned[start : start + n] = True
        k[~owned], v[~owned] = math.nan, math.nan
        bounds = {
            "q_begin": int32(q_starts),
            "q_end": int32([s + n for s, n in zip(q_starts, case.q_lens, strict=True)]),
        }
        kv_ends = int32([s + n for s, n in zip(kv_starts, kv_lens, strict=True)])
        owned_kv = {"begin": int32(kv_starts), "end": kv_ends}
    elif case.layout in ("left", "right", "batched"):
        q = make_random(batch, longest_q, case.heads, case.dim)
        k, v = (make_random(batch, longest_kv, case.kv_heads, case.dim) for _ in range(2))
        if case.layout == "batched":
            assert len(set(case.q_lens)) == len(set(kv_lens)) == 1
        for b, nk in enumerate(kv_lens):
            unused = slice(0, longest_kv - nk) if case.layout == "left" else slice(nk, longest_kv)
            k[b, unused], v[b, unused] = math.nan, math.nan
        if case.layout == "left":
            bounds = {"q_begin": int32([longest_q - n for n in case.q_lens])}
            owned_kv = {"begin": int32([longest_kv - n for n in kv_lens])}
        elif case.layout == "right":
            bounds, owned_kv = {"q_end": int32(case.q_lens)}, {"end": int32(kv_lens)}
    else:
        assert len(set(case.q_lens)) == 1
        q = make_random(batch, longest_q, case.heads, case.dim)
        per_head = case.layout in ("cache_heads", "paged_heads")
        lens = torch.tensor(kv_lens)[:, None].repeat(1, case.kv_heads)
        if per_head:  # every head its own length
            lens = (lens - torch.arange(case.kv_heads) * 3).clamp(min=0)
        if case.layout.startswith("cache"):
            k, v = (make_random(batch, longest_kv + 9, case.kv_heads, case.dim) for _ in range(2))
            for b in range(batch):
                for h in range(case.kv_heads):
                    k[b, lens[b, h] :, h], v[b, lens[b, h] :, h] = math.nan, math.nan
        else:
            pages_of = -(-longest_kv // case.page_size) + 1
            tables = case.kv_heads if per_head else 1
            count = batch * tables * pages_of + 2
            shape = (count, case.page_size, 1 if per_head else case.kv_heads, case.dim)
            k, v = make_random(*shape), make_random(*shape)
            table = torch.randperm(count)[: batch * tables * pages_of].view(batch, tables, pages_of)
            owned = torch.zeros(count, case.page_size, dtype=torch.bool)
            for b in range(batch):
                for t in range(tables):
                    for row in range(int(lens[b, t])):
                        owned[table[b, t, row // case.page_size], row % case.page_size] = True
                    used = -(-int(lens[b, t]) // case.page_size)
                    table[b, t, used:] = 2**30  # entries beyond the length are never read
            k[~owned.to(DEVICE)], v[~owned.to(DEVICE)] = math.nan, math.nan
            owned_kv["page_table"] = int32((table if per_head else table[:, 0]).tolist())
        owned_kv["end"] = int32((lens if per_head else lens[:, 0]).tolist())
    route = None
    if case.route != "none":
        sizes = (batch,) if case.route == "sequence" else (batch, case.kv_heads)
        route = (torch.arange(math.prod(sizes), device=DEVICE).view(sizes) % 2).to(torch.int32)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    return {
        "q": q,
        "kv": KeyValues(k, v, **owned_kv),
        "routing": Routing(route, case.full, case.sparse),
        "scale": scale,
        **bounds,
    }


def upcast(arguments: dict, dtype: torch.dtype = torch.float64) -> dict:
    kv = arguments["kv"]
    kv = kv._replace(k=kv.k.to(dtype), v=kv.v.to(dtype))
    return {**arguments, "q": arguments["q"].to(dtype), "kv": kv}


def error_of(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error over finite entries; infinities must stand in the same places, NaN nowhere."""
    x = x.double()
    assert not x.isnan().any(), f"{int(x.isnan().sum())} of {x.numel()} elements are NaN"
    finite = exact.isfinite()
    assert torch.equal(x.isfinite(), finite)
    assert torch.equal(x[~finite], exact[~finite])
    norm = exact[finite].norm()
    return float((x[finite] - exact[finite]).norm() / norm) if norm > 0 else float(x[finite].abs().sum())


def check(case: Case) -> None:
    arguments = make(case)
    out, lse = operators.attend(**arguments)
    exact_out, exact_lse = reference.attend(**upcast(arguments))
    plain_out, _ = reference.attend(**arguments)
    assert error_of(out, exact_out) <= 2 * error_of(plain_out, exact_out) + 1e-4
    assert error_of(lse, exact_lse) <= 2e-5  # fp32 throughout
    again, lse_again = operators.attend(**arguments)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)  # the same bits


DTYPES = (torch.bfloat16, torch.float16)
DIMS = (8, 40, 64, 72, 96, 104, 128, 160, 256)
GROUPS = ((4, 4), (4, 2), (8, 2), (7, 1), (8, 1), (16, 1), (14, 2), (3, 1), (32, 1))
LAYOUTS = ("left", "right", "packed", "cache", "cache_heads", "paged", "paged_heads")


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype in DTYPES:
        for dim in DIMS:
            prefill = Case((200, 63, 129), layout="packed", dim=dim, dtype=dtype)
            found += [prefill, replace(prefill, q_lens=(1, 1, 1), kv_lens=(200, 63, 129), layout="cache")]
            found += [replace(prefill, q_lens=(9, 9, 9), kv_lens=(200, 63, 129), layout="paged")]
            found += [replace(prefill, q_lens=(40, 40, 40), kv_lens=(2500, 63, 1700), layout="cache")]  # tiles are cut
            for n in (5, 8, 13, 16):  # a few queries over a long cache, whose tiles are cut
                few = replace(prefill, q_lens=(n, n, n), heads=8, kv_heads=2)
                found.append(replace(few, kv_lens=(2500, 63, 1700), layout="cache" if n > 8 else "paged"))
        for heads, kv_heads in GROUPS:
            base = Case((200, 63, 129), heads=heads, kv_heads=kv_heads, layout="packed", dtype=dtype)
            found.append(base)
            for q_len in (1, 2, 5, 8):
                found.append(replace(base, q_lens=(q_len,) * 3, kv_lens=(200, 63, 129), layout="cache"))
    for layout in LAYOUTS:
        ragged = layout in ("left", "right", "packed")
        for route in ("none", "sequence", "heads"):
            if layout.endswith("heads") and route == "none":
                continue
            for q_len in (1, 3, 64, 130):
                q_lens = (q_len, max(q_len - 1, 0), q_len) if ragged else (q_len,) * 3
                found.append(Case(q_lens, (333, 64, 257), layout=layout, route=route))
            found.append(Case((64, 64), (1900, 2300), layout=layout, route=route))
    for page_size in (1, 7, 16, 64, 100, 256):
        found.append(Case((1, 1), (300, 517), layout="paged", page_size=page_size))
        found.append(Case((40, 40), (300, 517), layout="paged_heads", page_size=page_size))
    patterns = [
        Streaming(0, 1),
        STREAMING,
        Streaming(128, 256, align=128),
        Streaming(64, 64, align=64),
    ]
    patterns += [Triangle(16, 32, 20), Triangle(0, 128, 50, align=128), Full()]
    for sparse in patterns:
        found.append(Case((300, 129, 1), layout="packed", sparse=sparse, heads=8))
        found.append(Case((50, 50), (300, 129), layout="cache", sparse=sparse))
        found.append(Case((50, 50), (2300, 129), layout="cache", sparse=sparse))
        found.append(Case((1, 1), (700, 129), layout="cache", sparse=sparse))
    for n in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193):  # block edges
        found.append(Case((n,), route="none"))
        found.append(Case((1,), (n,), layout="cache", route="none"))
        found.append(Case((n, 2), layout="packed", route="none", heads=2, dim=64))
    found.append(Case((0, 5, 0, 64), (0, 5, 7, 0), layout="packed"))  # empty sequences, queries without keys
    found.append(Case((5, 5, 5), (0, 1, 3), layout="cache"))
    found.append(Case((80, 80), (0, 33), layout="cache_heads"))
    found.append(Case((2000, 1), layout="packed", heads=16, kv_heads=4, sparse=Streaming(128, 256)))
    for n in (1, 9, 16):
        found.append(Case((n,) * 40, tuple(range(0, 4000, 100)), layout="cache", heads=8, kv_heads=2))
    sorted_rows = Case((4096, 300), layout="packed", heads=32, kv_heads=8, dim=64, sparse=Streaming(128, 512))
    found.append(sorted_rows)  # of whole tiles
    for dim in (160, 256):  # key blocks of 80, and of 64 where pages or lists ask for them
        wide = Case((700, 333), layout="packed", dim=dim, heads=8, kv_heads=2, sparse=Streaming(100, 170))
        found += [wide, replace(wide, q_lens=(500, 500), kv_lens=(720, 1111), layout="cache")]
        for page_size in (16, 40, 64, 160):
            paged = replace(wide, q_lens=(300, 300), kv_lens=(420, 999), layout="paged", page_size=page_size)
            found += [paged, replace(paged, layout="paged_heads", sparse=Triangle(16, 96, 50))]
        whole = Case((16, 16), (200, 200), heads=8, kv_heads=2, dim=dim)  # 64 rows leave through shared memory
        found += [replace(whole, dtype=dtype) for dtype in DTYPES]
    found.append(Case((900, 900), layout="batched", heads=16, kv_heads=4, route="heads"))  # rows take turns
    for scale in (0.0, -0.2, 1.5):
        found.append(Case((100, 100), (130, 130), scale=scale, layout="batched"))
        found.append(Case((1, 1), (130, 130), scale=scale, layout="batched"))
    for layout in ("packed", "paged"):
        found.append(Case((33, 33), (133, 95), layout=layout, odd_strides=True))
    return found


@pytest.mark.parametrize("case", cases(), ids=Case.label)
def test_attend(case: Case) -> None:
    check(case)


MANY_TILES = [  # of 192 rows: at least four per multiprocessor
    replace(case, dtype=dtype)
    for dtype in DTYPES
    for case in (
        Case((1500, 63, 193), layout="packed", heads=128, kv_heads=128, dim=64),
        Case((1100, 1), layout="packed", heads=192, kv_heads=64, dim=64, sparse=Streaming(128, 256, align=128)),
        Case((800, 191), layout="left", heads=128, kv_heads=128, dim=40, sparse=Triangle(16, 32, 20)),
        Case((400, 400), (900, 431), layout="paged", heads=256, kv_heads=64, dim=64),
        Case((600, 600), (90, 0), layout="cache", heads=256, kv_heads=64, dim=64),  # rows and tiles without keys
        Case((800, 800), (877, 801), layout="paged_heads", page_size=256, heads=128, kv_heads=128, dim=48),
        Case((4096,), heads=32, kv_heads=8, dim=64, sparse=Streaming(128, 512)),  # rows take turns
    )
]


@pytest.mark.parametrize("case", MANY_TILES, ids=Case.label)
def test_long_prompts_of_narrow_heads(case: Case) -> None:
    check(case)
    if torch.cuda.get_device_capability() != (9, 0):
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        operators.attend(**make(case))
        torch.cuda.synchronize()
    names = [event.name.replace("(int)", "") for event in profiler.events() if "attend_kernel" in event.name]
    assert names and all("64, 3, 128" in name for name in names), names  # three warpgroups


@pytest.mark.parametrize("width", (64, 128))
@pytest.mark.parametrize("kv_heads", (1, 2))
@pytest.mark.parametrize(("q_len", "kv_len", "heads"), ((384, 384, 4), (300, 555, 14), (1, 333, 4), (130, 999, 2)))
def test_block_lists(width: int, kv_heads: int, q_len: int, kv_len: int, heads: int) -> None:
    torch.manual_seed(q_len + width)
    batch, q_blocks = 2, -(-q_len // 128)
    blocks = torch.full((batch, kv_heads, q_blocks, -(-kv_len // width)), 2**30, dtype=torch.int32)
    counts = torch.zeros(batch, kv_heads, q_blocks, dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            for i in range(q_blocks):
                last = (kv_len - q_len + min((i + 1) * 128, q_len) - 1) // width
                chosen = [n for n in range(last + 1) if n in (0, last) or torch.rand(()) < 0.4]
                counts[b, h, i] = len(chosen)
                blocks[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    pattern = BlockSparse(blocks=blocks.to(DEVICE), counts=counts.to(DEVICE), width=width)
    case = Case((q_len,) * batch, (kv_len,) * batch, heads=heads, kv_heads=kv_heads, route="sequence")
    check(replace(case, sparse=pattern))
    check(replace(case, sparse=pattern, full=Streaming(16, 32), layout="cache"))


MILLION = 1 << 20


@pytest.mark.parametrize("layout", ("cache", "cache_heads"))
@pytest.mark.parametrize("q_len", (1, 20))
def test_a_million_keys(q_len: int, layout: str) -> None:
    """A decode step, and a chunk of a prompt."""
    check(Case((q_len,), (MILLION,), layout=layout, sparse=PUBLISHED))


def test_a_prompt_of_a_million_tokens() -> None:
    """Rows from all over it, each against the reference over the keys before it."""
    arguments = make(Case((MILLION,), sparse=PUBLISHED))
    out, lse = operators.attend(**arguments)
    for end in (40, MILLION // 2 + 3, MILLION):
        kv = KeyValues(arguments["kv"].k[:, :end], arguments["kv"].v[:, :end])
        part = {**arguments, "q": arguments["q"][:, end - 40 : end], "kv": kv}
        exact_out, exact_lse = reference.attend(**upcast(part))
        plain_out, _ = reference.attend(**part)
        assert error_of(out[:, end - 40 : end], exact_out) <= 2 * error_of(plain_out, exact_out) + 1e-4
        assert error_of(lse[..., end - 40 : end], exact_lse) <= 2e-5


def test_large_scores() -> None:
    """Scores of thousands: the running maximum keeps every exponential finite."""
    arguments = make(Case((200,), route="none", dim=64))
    arguments["q"] = arguments["q"] * 200
    out, lse = operators.attend(**arguments)
    exact_out, exact_lse = reference.attend(**upcast(arguments))
    assert error_of(out, exact_out) < 1e-2 and error_of(lse, exact_lse) < 1e-3


# Rows of a decode kernel, of a whole tile, and of a tile cut into pieces.
@pytest.mark.parametrize(("q_len", "kv_len"), ((6, 3), (2, 4000), (200, 90), (200, 5000)))
def test_rows_without_keys_are_zero_and_rows_of_infinities_nan(q_len: int, kv_len: int) -> None:
    torch.manual_seed(0)
    q = torch.rand(1, q_len, 2, 64, device=DEVICE, dtype=torch.bfloat16) + 0.5
    k, v = torch.randn(2, 1, kv_len, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    k[0, :, 1] = -torch.inf  # all scores of head 1
    v[0, 0, 0] = torch.nan  # seen by every query of head 0 that sees any key
    stored = torch.tensor([kv_len], dtype=torch.int32, device=DEVICE)
    out, lse = flux_ext.attention(q, k, v, kv_len=stored, return_lse=True)
    empty = max(q_len - kv_len, 0)
    assert (out[:, :empty] == 0).all() and (lse[..., :empty] == -torch.inf).all()
    assert out[:, empty:].isnan().all()
    assert lse[:, 0, empty:].isfinite().all() and (lse[:, 1] == -torch.inf).all()


def test_other_stream() -> None:
    arguments = make(Case((1, 1), (3000, 2000), layout="cache"))
    expected = operators.attend(**arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = operators.attend(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@two_gpus
@pytest.mark.parametrize("q_len", (1, 20, 300))
def test_each_gpu_runs_what_lies_on_it(q_len: int) -> None:
    """Whatever the current device is, and with both at work at once."""
    arguments = make(Case((q_len, q_len), (700, 900), layout="cache"))
    elsewhere = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("cuda:1"), arguments)
    x = random(2, 150, 4, 128, dtype=torch.bfloat16)
    router = LayerRouter(128).to("cuda:1").requires_grad_(False)
    got = operators.attend(**elsewhere)
    expected = operators.attend(**arguments)
    _, route = operators.route(x.to("cuda:1"), router.weights(), 100, False)
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in (*got, route))
    assert all(torch.equal(a, b.to(DEVICE)) for a, b in zip(expected, got, strict=True))
    with torch.cuda.device(1):
        again = operators.attend(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@two_gpus
def test_tensors_on_two_gpus_are_refused() -> None:
    q, k = (random(1, 8, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), got cuda:1"):
        operators.attend(q, KeyValues(k.to("cuda:1"), k), Routing(None, Full(), Full()), 1.0)
    with pytest.raises(ValueError, match=r"route must be on the device of q \(cuda:0\), got cuda:1"):
        operators.attend(q, KeyValues(k, k), Routing(int32([0]).to("cuda:1"), Full(), Full()), 1.0)


@pytest.mark.parametrize("layout", ("cache", "paged"))
def test_graph_with_growing_lengths(layout: str) -> None:
    """A captured decode step stays right while lengths and routes on the device change between replays."""
    arguments = make(Case((2, 2, 2), (5000, 3000, 4000), heads=8, layout=layout, sparse=Streaming(64, 128)))
    kv, route = arguments["kv"], arguments["routing"].route
    for x in (kv.k, kv.v):
        x.nan_to_num_()
    most = kv.end.clone()
    lens_now = most.clone()
    operators.attend(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv.end.copy_(lens_now)  # a copy, not a kernel, is what the launch overlaps with
        out, lse = operators.attend(**arguments)
    for step, lens in enumerate(([2, 2, 2], [64, 0, 1], [1000, 3000, 65], [4999, 7, 4000])):
        lens_now.copy_(torch.minimum(int32(lens), most))
        route.copy_(torch.randint(0, 2, route.shape, generator=torch.manual_seed(step)))
        out.fill_(math.nan)
        graph.replay()
        exact_out, exact_lse = reference.attend(**upcast(arguments))
        assert error_of(out, exact_out) < 1e-2
        assert error_of(lse, exact_lse) < 1e-4


def test_float32_is_refused() -> None:
    x = torch.randn(1, 8, 2, 64, device=DEVICE)
    with pytest.raises(ValueError, match="float16 or bfloat16 on CUDA, got float32"):
        operators.attend(x, KeyValues(x, x), Routing(None, Full(), Full()), 1.0)
