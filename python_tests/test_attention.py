"""The attention operator against its slow twin, over the whole matrix."""

import pytest
import torch
from cases import ALIGNED, FEW, STREAMING, Case, cases, make

import flux_ext
from flux_ext import BlockSparse, Full, Triangle
from flux_ext.operators import reference
from flux_ext.operators.patterns import dense_mask
from flux_ext.operators.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", cases((64, 8, 40, 96, 128, 256)), ids=str)
def test_forward_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check_forward(case, dtype, "cuda")


def check_forward(case: Case, dtype: torch.dtype, device: str) -> None:
    x = make(case, dtype, device)
    out, lse = flux_ext.attention(x.q, x.k, x.v, x.route, return_lse=True, **x.kwargs)
    exact, exact_lse = reference.attention(*_args(x.cast(torch.float64)), return_lse=True, **x.kwargs)
    plain, plain_lse = reference.attention(*_args(x), return_lse=True, **x.kwargs)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_as_accurate(out, exact, plain)
    assert_as_accurate(lse, exact_lse, plain_lse.float(), what="lse")


def _args(x):
    return x.q, x.k, x.v, x.route


GRADIENT_CASES = [c for c in cases((16, 40)) if "paged" not in c.layout]


@pytest.mark.parametrize("fractional", [False, True], ids=["hard", "mixed"])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_backward(case: Case, fractional: bool) -> None:
    x = make(case)
    mixed = fractional and x.route is not None
    generator = torch.Generator().manual_seed(1)
    exact_args = [t.double() for t in _args(x)[:3]]
    full, sparse = (
        reference.attention(*exact_args, None if x.route is None else torch.full_like(x.route, i), **x.kwargs)
        for i in (0, 1)
    )
    weight = torch.randn(full.shape, generator=generator, dtype=torch.float64)
    if mixed:  # one sign throughout the sums of a route's gradient: where terms cancel, only rounding is left
        weight = weight.abs() * (sparse - full).sign()
    grads = {}
    for name, dtype, attention in (
        ("got", torch.float32, flux_ext.attention),
        ("plain", torch.float32, reference.attention),
        ("exact", torch.float64, reference.attention),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in _args(x)[:3]]
        route = x.route
        if mixed:
            route = torch.linspace(0.1, 0.9, route.numel(), dtype=dtype).view(route.shape)
            leaves.append(route.requires_grad_())
        out = attention(*leaves[:3], route, **x.kwargs)
        grads[name] = torch.autograd.grad((out * weight.to(dtype)).nan_to_num().sum(), leaves)
    for label, got, plain, exact in zip(
        ("q", "k", "v", "route"), grads["got"], grads["plain"], grads["exact"], strict=False
    ):
        # Padding is NaN in the inputs; its gradient is 0 here and whatever autograd makes of it in the twin.
        real = ~x.__dict__[label].isnan() if label != "route" else torch.ones_like(exact, dtype=torch.bool)
        # Sums over all keys or queries in fp32: their order alone makes a few epsilons.
        floor = 16 * torch.finfo(torch.float32).eps
        want, base = torch.where(real, exact, 0), torch.where(real, plain, 0)
        assert_as_accurate(got * real, want, base, floor=floor, what=f"grad of {label}")
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_in_half_precision(dtype: torch.dtype) -> None:
    x = make(Case((90, 90), (120, 120), head_dim=64), dtype)
    grads = []
    for d, attention in (
        (dtype, flux_ext.attention),
        (dtype, reference.attention),
        (torch.float64, reference.attention),
    ):
        leaves = [t.to(d).requires_grad_() for t in (x.q, x.k, x.v)]
        grads.append(torch.autograd.grad(attention(*leaves, x.route, **x.kwargs).double().square().sum(), leaves))
    for label, got, plain, exact in zip("qkv", *grads, strict=True):
        assert_as_accurate(got, exact, plain, what=f"grad of {label}")


@pytest.mark.parametrize("blocks", ["diagonal", "random", "all"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lens", [(300, 300), (200, 500), (129, 129)], ids=str)
def test_block_lists(lens: tuple[int, int], width: int, blocks: str) -> None:
    q_len, kv_len = lens
    q, k, v = torch.randn(1, q_len, 4, 32), torch.randn(1, kv_len, 2, 32), torch.randn(1, kv_len, 2, 32)
    q_blocks, offset = -(-q_len // 128), kv_len - q_len
    lists = torch.zeros(1, 2, q_blocks, -(-kv_len // width), dtype=torch.int32)
    counts = torch.zeros(1, 2, q_blocks, dtype=torch.int32)
    for h in range(2):
        for i in range(q_blocks):
            last = (offset + min((i + 1) * 128, q_len) - 1) // width
            chosen = {"diagonal": [last], "all": list(range(last + 1))}.get(blocks)
            if chosen is None:
                chosen = [n for n in range(last + 1) if torch.rand(()) < 0.5]
            counts[0, h, i] = len(chosen)
            lists[0, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    pattern = BlockSparse(blocks=lists, counts=counts, width=width)
    route = torch.tensor([[0, 1]])
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flux_ext.attention(*leaves, route, sparse=pattern, return_lse=True)
    exact, exact_lse = reference.attention(*(t.double() for t in leaves), route, sparse=pattern, return_lse=True)
    plain, plain_lse = reference.attention(*leaves, route, sparse=pattern, return_lse=True)
    assert_as_accurate(out, exact, plain)
    assert_as_accurate(lse, exact_lse, plain_lse, what="lse")
    for got, want in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_stand_where_plain_torch_has_them(value: float) -> None:
    """A value that every query sees (key 0). What a query does not see may or may not reach it."""
    x = make(Case((40,), (40,), head_dim=16, route="none"))
    v, k = x.v.clone(), x.k.clone()
    v[0, 0, 0, 3] = value
    k[0, 0, 0, 3] = value
    out = flux_ext.attention(x.q, x.k, v)
    assert_as_accurate(out, reference.attention(x.q.double(), x.k.double(), v.double()), out)
    got, want = flux_ext.attention(x.q, k, x.v), reference.attention(x.q.double(), k.double(), x.v.double())
    assert torch.equal(got.isnan(), want.isnan())


def test_a_second_gradient_is_refused() -> None:
    x = make(Case((20,), (20,), head_dim=16))
    q = x.q.requires_grad_()
    (first,) = torch.autograd.grad(flux_ext.attention(q, x.k, x.v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second gradient"):
        torch.autograd.grad(first.square().sum(), q)


@pytest.mark.parametrize("bits", [0x7FC00001, -1, 0x7FFFFFFF])
def test_any_nan_is_a_nan(bits: int) -> None:
    x = make(Case((40,), (40,), head_dim=16, route="none"))
    k = x.k.clone()
    k.view(torch.int32)[0, 0, 0, 0] = bits
    out = flux_ext.attention(x.q, k, x.v)
    assert out[:, :, :2].isnan().all() and not out[:, :, 2:].isnan().any()


def test_a_row_that_sees_no_key_is_zero_whatever_the_keys_hold() -> None:
    q, kv = torch.randn(1, 6, 2, 16), torch.randn(1, 3, 2, 16)
    kv[0, 0] = torch.nan
    kv_len = torch.tensor([3], dtype=torch.int32)
    assert (flux_ext.attention(q, kv, kv, kv_len=kv_len)[:, :3] == 0).all()


def test_empty_rows_give_zero_and_minus_infinity() -> None:
    q, kv = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    out, lse = flux_ext.attention(q, kv, kv, kv_len=torch.tensor([2], dtype=torch.int32), return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -torch.inf).all()
    assert (out[:, 2:] != 0).all() and lse[..., 2:].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    """More workers cut the tiles in more places; the answer stays the same within rounding."""
    x = make(Case((1, 1), (1000, 700), "cached", head_dim=64))
    y = make(Case((300,), (300,), head_dim=64, heads=2, kv_heads=1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for z in (x, y):
            out = flux_ext.attention(*_args(z), **z.kwargs)
            assert torch.equal(out, flux_ext.attention(*_args(z), **z.kwargs)), "the same call gives the same bits"
            exact = reference.attention(*_args(z.cast(torch.float64)), **z.kwargs)
            assert_as_accurate(out, exact, reference.attention(*_args(z), **z.kwargs))
    finally:
        torch.set_num_threads(before)


def test_fractional_route_mixes_the_two_patterns() -> None:
    x = make(Case((80, 80), (80, 80), head_dim=16))
    w = torch.tensor([[0.0, 0.25], [1.0, 0.5]])
    full, sparse = (flux_ext.attention(x.q, x.k, x.v, torch.full((2, 2), r), sparse=STREAMING) for r in (0, 1))
    out = flux_ext.attention(x.q, x.k, x.v, w, sparse=STREAMING)
    weight = w.repeat_interleave(2, 1)[:, None, :, None]
    torch.testing.assert_close(out, (1 - weight) * full + weight * sparse)


def test_booleans_and_other_integers_are_routes_too() -> None:
    x = make(Case((80, 80), (80, 80), head_dim=16))
    want = flux_ext.attention(*_args(x), **x.kwargs)
    for dtype in (torch.bool, torch.int64, torch.int8):
        assert torch.equal(flux_ext.attention(x.q, x.k, x.v, x.route.to(dtype), **x.kwargs), want)


@pytest.mark.parametrize("pattern", [Full(), FEW, ALIGNED, Triangle(2, 6, last_q=5)], ids=str)
@pytest.mark.parametrize("lens", [(12, 12), (5, 30), (30, 5), (0, 4), (1, 1)], ids=str)
def test_core_mask_is_the_python_mask(pattern, lens) -> None:
    core = pytest.importorskip("flux_ext._C")
    numbers = pattern.numbers()
    assert torch.equal(torch.from_numpy(core.mask(numbers, *lens)), dense_mask(pattern, *lens))


@pytest.mark.parametrize("pattern", [FEW, STREAMING, ALIGNED, Triangle(0, 12, last_q=0, align=6)], ids=str)
def test_a_window_begins_where_the_mask_does(pattern) -> None:
    """Of numbers, arrays and tensors; below 0 where the window reaches back beyond the first token."""
    positions = torch.arange(60)
    found = pattern.window_begin(positions).tolist()
    assert found == pattern.window_begin(positions.numpy()).tolist() == [pattern.window_begin(p) for p in range(60)]
    for p in range(60):
        seen = dense_mask(pattern, 1, p + 1)[0]
        first = next(j for j in range(p + 1) if bool(seen[j:].all()))  # the sink may reach into the window
        assert first == (0 if found[p] <= pattern.sink else found[p])


@pytest.mark.parametrize("layout", ["batched", "packed"])
@pytest.mark.parametrize("value", [-0.01, 1.01, torch.nan, torch.inf])
def test_a_fractional_route_is_a_fraction(value: float, layout: str) -> None:
    x = make(Case((20, 20), (20, 20), layout, head_dim=16))
    w = torch.tensor([0.5, value])
    with pytest.raises(ValueError, match=f"a fractional route must be within .0, 1., got {w[1].item()}"):
        flux_ext.attention(x.q, x.k, x.v, torch.nn.Parameter(w), **x.kwargs)

    # Where values are not read, the sequence is NaN, and only that one.
    def attend(q, k, v, w):
        return flux_ext.attention(q, k, v, w, **x.kwargs)

    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(x.q, x.k, x.v, w)
    want = reference.attention(x.q, x.k, x.v, w, **x.kwargs)
    torch.testing.assert_close(out, want, equal_nan=True)
    other = (out[20:40], out[:20]) if layout == "packed" else (out[1], out[0])
    assert other[0].isnan().all() and not other[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_fraction_may_be_off_by_rounding(dtype: torch.dtype) -> None:
    """As a weight that is 1 plus and minus the same number (straight-through) may be."""
    x, eps = make(Case((20,), (20,), head_dim=16)), torch.finfo(dtype).eps
    for w in (-eps, 1 + eps):
        out = flux_ext.attention(x.q, x.k, x.v, torch.tensor([w], dtype=dtype), **x.kwargs)
        want = flux_ext.attention(x.q, x.k, x.v, torch.tensor([round(w)]), **x.kwargs)
        torch.testing.assert_close(out, want, atol=20 * eps + 1e-6, rtol=0)
        with pytest.raises(ValueError, match="a fractional route must be within"):
            flux_ext.attention(x.q, x.k, x.v, torch.tensor([w * 5 if w < 0 else 1 + 5 * eps], dtype=dtype), **x.kwargs)
