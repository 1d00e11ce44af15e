"""Mixed attention, in one walk over the keys, against its slow twin, over the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW, STREAMING, Case, cases, make
from mixtures import HALVES, PAIRS, check, gradients, mix_arguments, weights
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Full, Streaming
from flux_ext.operators import KeyValues, Routing, mix, mixture, reference
from flux_ext.operators.operands import bound_rows
from flux_ext.operators.routed_attention import _mix_by_two_calls
from flux_ext.operators.testing import assert_as_accurate

ops = torch.ops.flux_ext


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", cases((16, 64, 96, 128, 256)), ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    x, w = make(case, dtype), weights(case)
    out = flux_ext.attention(x.q, x.k, x.v, w, **x.kwargs)
    double = x.cast(torch.float64)
    exact = reference.attention(double.q, double.k, double.v, w.double(), **x.kwargs)
    assert out.dtype == dtype
    assert_as_accurate(out, exact, reference.attention(x.q, x.k, x.v, w, **x.kwargs))


@pytest.mark.parametrize("per_head", [False, True], ids=["sequence", "head"])
@pytest.mark.parametrize("case", [c for c in cases((40, 64, 96, 128, 256)) if "paged" not in c.layout], ids=str)
def test_gradients(case: Case, per_head: bool) -> None:
    check(make(case), weights(case, per_head), torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", ["batched", "packed", "left_padded"])
def test_gradients_in_half_precision(layout: str, head_dim: int, dtype: torch.dtype) -> None:
    case = Case((150, 150), (150, 150), layout, head_dim=head_dim, sparse=Streaming(9, 70))
    check(make(case), weights(case), dtype)


@pytest.mark.parametrize("lens", [(300, 300), (200, 500)], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_patterns_that_overlap_in_any_way(pair: str, lens: tuple[int, int]) -> None:
    case = Case((lens[0],) * 2, (lens[1],) * 2, heads=2, kv_heads=2, head_dim=32)
    x = make(case)
    x.kwargs["full"], x.kwargs["sparse"] = (p(x) if callable(p) else p for p in PAIRS[pair])
    check(x, weights(case), torch.float32)


def test_a_weight_of_0_or_1_is_that_branch() -> None:
    x = make(Case((130, 130), (130, 130), head_dim=64))
    out = flux_ext.attention(x.q, x.k, x.v, x.route.float(), **x.kwargs)
    torch.testing.assert_close(out, flux_ext.attention(x.q, x.k, x.v, x.route, **x.kwargs), atol=1e-6, rtol=1e-5)


def test_rows_of_which_a_branch_sees_nothing() -> None:
    """Empty lists: the sparse branch gives 0, and what it would have given has no gradient."""
    x = make(Case((140,), (140,), heads=2, kv_heads=2, head_dim=64))
    counts = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32)
    nothing = BlockSparse(torch.tensor([[[[0], [1]], [[0], [0]]]], dtype=torch.int32), counts)
    x.kwargs["sparse"] = nothing
    w = torch.tensor([[0.25, 1.0]])
    check(x, w, torch.float32)
    out = flux_ext.attention(x.q, x.k, x.v, w, **x.kwargs)
    full = flux_ext.attention(x.q, x.k, x.v)
    torch.testing.assert_close(out[0, :128, 0], 0.75 * full[0, :128, 0])
    assert not out[0, 128:, 1].any(), "weight 1 of nothing"
    _, _, sparse, full_lse, sparse_lse = ops.mix(*mix_arguments(x, w))
    assert (sparse_lse[0, 0, :128] == -torch.inf).all() and not sparse[0, :128, 0].any()
    assert full_lse.isfinite().all()


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_what_each_pattern_gives_is_what_attention_gives(layout: str) -> None:
    case = Case((90, 70) if layout == "packed" else (90, 90), (90, 70) if layout == "packed" else (90, 90), layout)
    x = make(case)
    _, full, sparse, full_lse, sparse_lse = ops.mix(*mix_arguments(x, weights(case)))
    for got, lse, route in ((full, full_lse, 0), (sparse, sparse_lse, 1)):
        chosen = torch.full((2,), route)
        x.kwargs["scale"] = 0.25
        want, want_lse = flux_ext.attention(x.q, x.k, x.v, chosen, return_lse=True, **x.kwargs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_whatever_the_threads(threads: int) -> None:
    case = Case((300, 300), (300, 300), heads=4, kv_heads=2, head_dim=64, sparse=Streaming(30, 100))
    x, before = make(case), torch.get_num_threads()
    of = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1))
    want = gradients(flux_ext.attention, x, weights(case), torch.float32, of)
    try:
        torch.set_num_threads(threads)
        got = gradients(flux_ext.attention, x, weights(case), torch.float32, of)
    finally:
        torch.set_num_threads(before)
    for name, t in want.items():
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("layout", ["batched", "right_padded", "packed", "cached", "packed_cached"])
def test_two_calls_give_the_same(layout: str) -> None:
    """What is done where there is no operator for it: on CUDA."""
    lens = (40, 40) if layout in ("batched", "cached") else (33, 0, 50)
    x = make(Case(lens, lens, layout))
    bounds = {n: x.kwargs.get(n) for n in ("cu_seqlens", "seq_start", "seq_end", "kv_len", "page_table")}
    kv, q_begin, q_end = bound_rows(x.q, x.k, x.v, **bounds)
    w = torch.linspace(0.1, 0.9, 2 * len(lens)).view(-1, 2).requires_grad_()
    routing = Routing(w, Full(), STREAMING)
    results = []
    for function in (mix, _mix_by_two_calls):
        out = function(x.q, kv, routing, 0.3, q_begin, q_end)
        results.append((out, *torch.autograd.grad(out.nan_to_num().square().sum(), w)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_packed_sequences_in_any_order() -> None:
    """Bounds that do not follow each other, with a gap and an empty sequence inside another."""
    q, k = torch.randn(30, 4, 16), torch.randn(30, 2, 16)
    begin, end = (torch.tensor(b, dtype=torch.int32) for b in ([20, 3, 0, 10], [30, 3, 8, 14]))
    w = torch.tensor([0.1, 0.9, 0.4, 0.7])
    arguments = q, KeyValues(k, k, begin, end), Routing(w, Full(), FEW), 0.25, begin, end
    want = reference.mix(*arguments)
    torch.testing.assert_close(mix(*arguments), want)
    torch.testing.assert_close(_mix_by_two_calls(*arguments), want)
    assert not want[8:10].any() and not want[14:20].any() and want[20:].all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck(layout: str, per_head: bool) -> None:
    case = Case((12, 12), (12, 12), layout, head_dim=16, sparse=FEW)
    x = make(case)
    x.q, x.k, x.v = (t.nan_to_num().requires_grad_() for t in (x.q, x.k, x.v))
    w = weights(case, per_head).requires_grad_()
    torch.library.opcheck(ops.mix.default, mix_arguments(x, w))
    with torch.no_grad():
        q, k, v, weight, *rest, page_table = (t.detach() if isinstance(t, Tensor) else t for t in mix_arguments(x, w))
        _, *branches = ops.mix(q, k, v, weight, *rest, page_table)
        backward = [torch.randn_like(q), q, k, v, *branches, weight, *rest]
    torch.library.opcheck(ops.mix_backward.default, backward)


def test_transforms_take_the_twin() -> None:
    x = make(Case((9, 9), (9, 9), head_dim=16, sparse=FEW))
    w, qkv = torch.tensor([[0.2, 0.9], [0.1, 0.7]]), (x.q, x.k, x.v)

    def loss(attention: Any) -> Any:
        return lambda *qkvw: attention(*qkvw, sparse=FEW).square().sum()

    got, want = (torch.func.grad(loss(f), (0, 1, 2, 3))(*qkv, w) for f in (flux_ext.attention, reference.attention))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    several = torch.stack([w, 1 - w])
    out = torch.func.vmap(lambda w: flux_ext.attention(*qkv, w, sparse=FEW))(several)
    torch.testing.assert_close(out, torch.stack([flux_ext.attention(*qkv, u, sparse=FEW) for u in several]))


def test_there_is_one_gradient_and_none_over_pages() -> None:
    x = make(Case((9, 9), (9, 9), head_dim=16, sparse=FEW))
    q = x.q.requires_grad_()
    out = flux_ext.attention(q, x.k, x.v, torch.tensor([0.2, 0.3]), sparse=FEW)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second gradient"):
        grad.sum().backward()
    x = make(Case((2, 2), (20, 33), "paged", head_dim=16))
    out = flux_ext.attention(x.q.requires_grad_(), x.k, x.v, torch.tensor([0.2, 0.3]), **x.kwargs)
    with pytest.raises(RuntimeError, match="paged cache"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (None, "route must be a weight, floats .*, got None"),
        (torch.tensor([0, 1]), "route must be a weight, floats .*, got torch.int64"),
        (torch.rand(3), r"route must be \[2\] or \[2, 2\], got \[3\]"),
        (torch.rand(2, 3), r"route must be \[2\] or \[2, 2\], got \[2, 3\]"),
        (torch.rand(2, 2, 1), r"route must be \[B\] or \[B, Hkv\], got shape \[2, 2, 1\]"),
        (torch.tensor([0.5, 1.5]), r"a fractional route must be within \[0, 1\], got 1.5"),
        (torch.rand(2, device="meta"), r"route must be on the device of q \(cpu\), got meta"),
    ],
)
def test_bad_weights(route: Tensor | None, message: str) -> None:
    x = make(Case((9, 9), (9, 9), head_dim=16))
    with pytest.raises(ValueError, match=message):
        mix(x.q, KeyValues(x.k, x.v), Routing(route, Full(), FEW), 0.25)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (5, lambda t: t.double(), "sparse must have the dtype of q"),
        (5, lambda t: t[:, :-1], "sparse must have the shape of q"),
        (7, lambda t: t[..., :-1], "sparse_lse must be like full_lse"),
        (7, lambda t: t.double(), "sparse_lse must be like full_lse"),
        (6, lambda t: t[..., :-1], "lse must be float32"),
        (8, lambda t: t.double(), "a fractional route must be float32 here, got float64"),
        (8, lambda t: t[:1], r"route must be \[2\] or \[2, 2\], got \[1, 2\]"),
    ],
)
def test_bad_arguments_of_the_gradient(place: int, change: Any, message: str) -> None:
    case = Case((12, 12), (12, 12), head_dim=16, sparse=FEW)
    q, k, v, w, *rest, page_table = mix_arguments(make(case), weights(case))
    _, *branches = ops.mix(q, k, v, w, *rest, page_table)
    arguments = [torch.randn_like(q), q, k, v, *branches, w, *rest]
    arguments[place] = change(arguments[place])
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.mix_backward(*arguments)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "head_dim", "one_walk"),
    [
        (200, 300, 64, {False: True, True: True}),
        (16, 16, 64, {False: False, True: False}),  # 64 rows of a KV head
        (149, 300, 64, {False: False, True: False}),  # attention shares out the keys
        (16384, 16384, 128, {False: True, True: True}),
        (16385, 16385, 128, {False: False, True: True}),
        (200, 300, 136, {False: True, True: False}),
    ],
)
def test_where_cuda_walks_once(monkeypatch, q_len, kv_len, head_dim, one_walk, hopper):
    monkeypatch.setattr(mixture, "_is_hopper", lambda _: hopper)
    q = torch.empty(1, q_len, 8, head_dim, device="meta")
    kv = KeyValues(*(torch.empty(1, kv_len, 2, head_dim, device="meta") for _ in range(2)))
    assert mixture.one_walk_is_faster(q, kv, STREAMING) == one_walk[hopper]
    assert not mixture.walks_once(q, kv, Routing(None, Full(), STREAMING)), "neither on the CPU nor on CUDA"
