"""Views whose entries lie further apart than 32 bits count."""

from pathlib import Path

import pytest
import torch
from cases import FEW
from torch import Tensor

import flux_ext
from flux_ext import operators
from flux_ext.routers.modules import LayerRouter

STEPS = (2**31, 2**32)  # cut to 32 bits, the first leads outside the tensor and the second to another element


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """int32 in a sparse file: 16 GiB of addresses, hardly any memory or disk."""
    path: Path = tmp_path_factory.mktemp("far") / "memory"
    return torch.from_file(str(path), shared=True, size=STEPS[-1] + 4096, dtype=torch.int32)


def far(memory: Tensor, values: Tensor, *strides: int) -> Tensor:
    """The same values at other strides."""
    view = memory.as_strided(values.shape, strides)
    view.copy_(values)
    return view


def ints(*x: int) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["kv_len", "route", "seq_start", "seq_end"])
def test_bounds_and_routes(memory: Tensor, name: str, step: int) -> None:
    q, k = torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    values = ints(1, 0) if name == "route" else ints(3, 5)
    want = flux_ext.attention(q, k, k, **{name: values}, sparse=FEW)
    got = flux_ext.attention(q, k, k, **{name: far(memory, values, step)}, sparse=FEW)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["kv_len", "route"])
def test_strides_that_fit_but_not_their_multiples(memory: Tensor, name: str) -> None:
    q, k = torch.randn(4, 2, 2, 16), torch.randn(4, 9, 2, 16)
    values = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.int32)
    values = values if name == "route" else values + 3
    want = flux_ext.attention(q, k, k, **{name: values}, sparse=FEW)
    assert torch.equal(flux_ext.attention(q, k, k, **{name: far(memory, values, 2**30, 1)}, sparse=FEW), want)
    assert torch.equal(flux_ext.attention(q, k, k, **{name: far(memory, values, 1, 2**31)}, sparse=FEW), want)


def test_packed_and_paged(memory: Tensor) -> None:
    q, k = torch.randn(8, 2, 16, requires_grad=True), torch.randn(8, 2, 16)
    cu_seqlens = ints(0, 3, 8)
    outs = [flux_ext.attention(q, k, k, cu_seqlens=c) for c in (cu_seqlens, far(memory, cu_seqlens, 2**31))]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), q)[0] for out in outs))
    q, pages, kv_len = torch.randn(2, 1, 2, 16), torch.randn(4, 4, 2, 16), ints(7, 5)
    table = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    outs = [
        flux_ext.attention(q, pages, pages, kv_len=kv_len, page_table=t) for t in (table, far(memory, table, 2**31, 1))
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("step", STEPS)
def test_bounds_of_the_router(memory: Tensor, step: int) -> None:
    x, router = torch.randn(2, 9, 2, 16), LayerRouter(16, 3)
    assert torch.equal(router(x, None, far(memory, ints(4, 7), step)), router(x, None, ints(4, 7)))


@pytest.mark.parametrize("which", ["q", "k", "v", "x"])
def test_states(memory: Tensor, which: str) -> None:
    """q, k, v and a router's states whose sequences, rows or heads lie that far apart."""
    floats = memory.view(torch.float32)
    values = torch.randn(2, 3, 2, 16)
    for strides in ((2**31, 32, 16, 1), (96, 2**30, 16, 1), (96, 32, 2**31, 1)):
        view = far(floats, values, *strides)
        if which == "x":
            router = LayerRouter(16, 2)
            torch.testing.assert_close(router(view), router(values))
        else:
            rest = {x: torch.randn(2, 3, 2, 16) for x in "qkv" if x != which}
            got, want = (flux_ext.attention(**rest, **{which: x.detach().requires_grad_()}) for x in (view, values))
            assert torch.equal(got, want)


def test_appended_tokens(memory: Tensor) -> None:
    floats, new = memory.view(torch.float32), torch.randn(2, 1, 1, 16)

    def append(k: Tensor) -> Tensor:
        pools = [torch.zeros(4, 8, 1, 16) for _ in range(2)]
        base, ring = (ints(*x).view(2, 1) for x in ((0, 2), (2, 2)))
        table, kv_len, seen = (torch.zeros(s, dtype=torch.int32) for s in ((2, 1, 2), (2, 1), (2, 1)))
        slots = torch.zeros((), dtype=torch.int64)
        operators.append(k, k, *pools, base, ring, table, kv_len, seen, slots, FEW, 16)
        return pools[0]

    assert torch.equal(append(far(floats, new, 2**31, 16, 16, 1)), append(new))
