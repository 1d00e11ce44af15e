"""The operators as torch sees them: schemas, fake kernels, gradients, compile, export."""

import pytest
import torch
from cases import FEW, Case, make

import flux_ext
from flux_ext.operators.operands import AttendArguments
from flux_ext.routers.modules import HeadRouter, LayerRouter

ops = torch.ops.flux_ext
PATTERNS = [*flux_ext.Full().numbers(), 0, *FEW.numbers(), 0]


def arguments(layout: str, grad: bool = True):
    x = make(Case((12, 12), (12, 12), layout, head_dim=16))
    bounds = [x.kwargs["cu_seqlens"][:-1], x.kwargs["cu_seqlens"][1:]] * 2 if layout == "packed" else [None] * 4
    q, k, v = (t.nan_to_num().requires_grad_(grad) for t in (x.q, x.k, x.v))
    return list(AttendArguments(q, k, v, x.route, PATTERNS, None, None, None, None, 0.25, *bounds, None))


def test_the_flat_arguments_are_those_of_the_schema():
    assert AttendArguments._fields == tuple(x.name for x in ops.attend.default._schema.arguments)


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck_attend(layout):
    torch.library.opcheck(ops.attend.default, arguments(layout))


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck_attend_backward(layout):
    q, k, v, *rest, page_table = arguments(layout, grad=False)
    out, lse = ops.attend(q, k, v, *rest, page_table)
    torch.library.opcheck(ops.attend_backward.default, [torch.randn_like(out), q, k, v, out, lse, *rest])


@pytest.mark.parametrize("router", [LayerRouter(16, 4), HeadRouter(16, 4)], ids=["layer", "head"])
def test_opcheck_route(router):
    x = torch.randn(2, 10, 4, 16, requires_grad=True)
    end = torch.tensor([10, 7], dtype=torch.int32)
    torch.library.opcheck(ops.route.default, (x, router.weights(), 4, router.per_head, None, end))


def routed(q, k, v, x, router):
    return flux_ext.attention(q * 2, k, v, router.decide(x)[1], sparse=FEW)


def mixed(q, k, v, x, router):
    weight = router(x).softmax(-1)[..., 0]
    return flux_ext.attention(q * 2, k, v, weight, sparse=FEW)


@pytest.mark.parametrize("function", [routed, mixed])
def test_compile_fullgraph(function):
    q, k, v, *_ = arguments("batched")
    router = LayerRouter(16, 4)
    eager = function(q, k, v, q, router)
    compiled = torch.compile(function, fullgraph=True)(q, k, v, q, router)
    torch.testing.assert_close(compiled, eager)
    wanted = [q, k, v, *(router.weights() if function is mixed else [])]
    for got, want in zip(
        torch.autograd.grad(compiled.square().sum(), wanted),
        torch.autograd.grad(eager.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_compile_packed_queries_over_pages():
    x = make(Case((5, 1), (20, 33), "packed_paged", head_dim=16))
    args = (x.q, x.k, x.v, x.route)
    compiled = torch.compile(flux_ext.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, **x.kwargs), flux_ext.attention(*args, **x.kwargs))


def test_compile_with_dynamic_lengths_compiles_once():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    f = torch.compile(lambda q, k, v: flux_ext.attention(q, k, v), fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9, 17):
        x = torch.randn(1, n, 2, 16)
        torch.testing.assert_close(f(x, x, x), flux_ext.attention(x, x, x))
    assert len(graphs) == 1


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = LayerRouter(16, 4)

        def forward(self, q, k, v):
            return routed(q, k, v, q, self.router)

    q, k, v, *_ = arguments("batched", grad=False)
    layer = Layer().eval()
    program = torch.export.export(layer, (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), layer(q, k, v))
