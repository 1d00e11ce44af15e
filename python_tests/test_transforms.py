"""Forward-mode derivatives and torch.func over the operators: right, or a clear error."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from cases import ALIGNED, FEW, Case, make
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Triangle, operators
from flux_ext.operators import reference
from flux_ext.routers.modules import HeadRouter, LayerRouter

CASES = [
    Case((12, 12), (20, 20), head_dim=16),
    Case((9, 5), (9, 5), "left_padded", head_dim=16, sparse=Triangle(2, 4, last_q=3)),
    Case((9, 0, 5), (9, 0, 5), "packed", head_dim=16, sparse=ALIGNED),
    Case((3, 4), (11, 9), "packed_cached_per_head", head_dim=16),
    Case((2, 2), (11, 9), "paged", head_dim=16, route="sequence"),
]


def functions(case: Case):
    """The operator and its twin as functions of (q, k, v), what they are applied to, and a direction."""
    x = make(case)
    qkv = tuple(t.nan_to_num() for t in (x.q, x.k, x.v))
    direction = tuple(torch.randn_like(t) for t in qkv)
    return (
        *(lambda *qkv, f=f: f(*qkv, x.route, **x.kwargs) for f in (flux_ext.attention, reference.attention)),
        qkv,
        direction,
    )


def by_differences(f, qkv: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Tensor:
    """The derivative of f along a direction, by central differences in fp64."""
    h = 1e-5
    ahead, behind = (f(*(t.double() + s * d.double() for t, d in zip(qkv, direction, strict=True))) for s in (h, -h))
    return ((ahead - behind) / (2 * h)).float()


def close(got, want) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jvp(case):
    f, twin, qkv, direction = functions(case)
    value, tangent = torch.func.jvp(f, qkv, direction)
    close(value, f(*qkv))
    close(tangent, by_differences(twin, qkv, direction))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dual_numbers_of_a_part(case):
    f, twin, (q, k, v), (_, dk, _) = functions(case)
    with fw.dual_level():
        tangent = fw.unpack_dual(f(q, fw.make_dual(k, dk), v)).tangent
    close(tangent, by_differences(lambda k: twin(q.double(), k, v.double()), (k,), (dk,)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_torch_func(case):
    f, twin, qkv, _ = functions(case)
    for a, b in zip(
        *(torch.func.grad(lambda *x, g=g: g(*x).square().sum(), (0, 1, 2))(*qkv) for g in (f, twin)), strict=True
    ):
        close(a, b)
    for a, b in zip(
        *(torch.func.jacrev(lambda *x, g=g: g(*x).sum(-1), (0, 1, 2))(*qkv) for g in (f, twin)), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap(case):
    f, _, qkv, _ = functions(case)
    several = tuple(torch.stack([t, 2 * t, -t], 1) for t in qkv)
    close(
        torch.func.vmap(f, 1)(*several), torch.stack([f(*x) for x in zip(*(t.unbind(1) for t in several), strict=True)])
    )

    def loss(q, k, v):
        return f(q, k, v).square().sum()

    each = [torch.func.grad(loss)(*x) for x in zip(*(t.unbind(1) for t in several), strict=True)]
    close(torch.func.vmap(torch.func.grad(loss), 1)(*several), torch.stack(each))


def test_vmap_over_routes_and_bounds():
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 9, 2, 16)
    routes = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]]])
    lens = torch.tensor([[3, 9], [8, 4]], dtype=torch.int32)

    def f(route, kv_len):
        return flux_ext.attention(q, k, k, route, kv_len=kv_len, sparse=FEW)

    close(torch.func.vmap(f)(routes, lens), torch.stack([f(*x) for x in zip(routes, lens, strict=True)]))


def test_hessian():
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 4, 1, 8)

    def loss(attention):
        return lambda q: attention(q, k, k).square().sum()

    close(torch.func.hessian(loss(flux_ext.attention))(q), torch.func.hessian(loss(reference.attention))(q))


def test_fractional_routes():
    qkv = functions(CASES[0])[2]
    exact = tuple(t.double() for t in qkv)
    w, dw, pattern = torch.tensor([[0.2, 0.9], [0.1, 0.7]]), torch.randn(2, 2), FEW
    got = torch.func.jvp(lambda w: flux_ext.attention(*qkv, w, sparse=pattern), (w,), (dw,))[1]
    close(got, by_differences(lambda w: reference.attention(*exact, w, sparse=pattern), (w,), (dw,)))


def test_block_lists():
    q = torch.randn(1, 150, 2, 16)
    blocks, counts = torch.tensor([[[[0, 0], [0, 1]]] * 2]).int(), torch.tensor([[[1, 1], [1, 2]]]).int()
    pattern, direction = BlockSparse(blocks, counts), torch.randn_like(q)
    got = torch.func.jvp(lambda q: flux_ext.attention(q, q, q, full=pattern), (q,), (direction,))[1]
    close(got, by_differences(lambda q: reference.attention(q, q, q, full=pattern), (q,), (direction,)))


def test_low_precision_is_differentiated_in_fp32():
    f, twin, qkv, direction = functions(CASES[0])
    low = tuple(t.bfloat16() for t in qkv)
    tangent = torch.func.jvp(f, low, tuple(t.bfloat16() for t in direction))[1]
    assert tangent.dtype == torch.bfloat16
    exact = by_differences(twin, low, tuple(t.bfloat16() for t in direction))
    torch.testing.assert_close(tangent.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("router", [LayerRouter(16, 4), HeadRouter(16, 4)], ids=["layer", "head"])
def test_router(router):
    x, dx = torch.randn(2, 2, 10, 4, 16).unbind()
    end = torch.tensor([10, 7], dtype=torch.int32)
    weights = [w.detach() for w in router.weights()]

    def f(x):
        return operators.route(x, weights, 4, router.per_head, None, end)[0]

    def twin(x):
        return reference.route(x, [w.double() for w in weights], 4, router.per_head, None, end)[0]

    close(torch.func.jvp(f, (x,), (dx,))[1], by_differences(twin, (x,), (dx,)))
    got = torch.func.grad(lambda w: operators.route(x, w, 4, router.per_head)[0].square().sum())(weights)
    want = torch.func.grad(lambda w: reference.route(x, w, 4, router.per_head)[0].square().sum())(weights)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    close(torch.func.vmap(f)(torch.stack([x, dx])), torch.stack([f(x), f(dx)]))
    double = [torch.stack([w, 2 * w], -1) for w in weights]
    close(
        torch.func.vmap(lambda w: operators.route(x, w, 4, router.per_head)[0], -1)(double),
        torch.stack([operators.route(x, [n * w for w in weights], 4, router.per_head)[0] for n in (1, 2)]),
    )


def test_bad_input_is_refused_there_too():
    q = torch.randn(2, 8, 4, 16)
    k = torch.randn(2, 8, 2, 16)
    with pytest.raises(ValueError, match="kv_len must not exceed the 8 rows there are, got 9"):
        torch.func.jvp(lambda q: flux_ext.attention(q, k, k, kv_len=torch.tensor([9, 3]).int()), (q,), (q,))
    with pytest.raises(ValueError, match="multiple of the key heads"):
        torch.func.grad(lambda q: flux_ext.attention(q[:, :, :3], k, k).sum())(q)


def test_appending_has_no_derivative():
    k = torch.randn(1, 1, 1, 16)
    with fw.dual_level(), pytest.raises(RuntimeError, match="append has no forward-mode derivative"):
        pools = torch.zeros(2, 16, 1, 16), torch.zeros(2, 16, 1, 16)
        one = [torch.ones(1, 1, dtype=torch.int32) for _ in range(4)]
        table, slots = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
        operators.append(fw.make_dual(k, k), k, *pools, *one[:2], table, *one[2:], slots, FEW, 32)
