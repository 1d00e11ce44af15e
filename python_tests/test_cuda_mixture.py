"""Mixed attention on CUDA, forward and backward, against its slow twin, over the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW, PUBLISHED, Case, Inputs, cases, make
from mixtures import HALVES, PAIRS, check, gradients, mix_arguments, weights
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Streaming, Triangle
from flux_ext.operators import mixture, reference
from flux_ext.operators.testing import assert_as_accurate, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
ops = torch.ops.flux_ext


def weights_on_device(case: Case, per_head: bool = True) -> Tensor:
    return weights(case, per_head).to(DEVICE)


@pytest.fixture(params=["operator", "as attention chooses"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator wherever it takes a mixture, also on a GPU on which two calls are faster."""
    if request.param == "operator":
        monkeypatch.setattr(mixture, "one_walk_is_faster", lambda *_: True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", cases((16, 64, 96, 128, 256)), ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    x, w = make(case, dtype, DEVICE), weights_on_device(case)
    out = flux_ext.attention(x.q, x.k, x.v, w, **x.kwargs)
    double = x.cast(torch.float64)
    exact = reference.attention(double.q, double.k, double.v, w.double(), **x.kwargs)
    assert out.dtype == dtype
    assert_as_accurate(out, exact, reference.attention(x.q, x.k, x.v, w, **x.kwargs))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["sequence", "head"])
@pytest.mark.parametrize("case", [c for c in cases((40, 64, 96, 128, 256)) if "paged" not in c.layout], ids=str)
def test_gradients(case: Case, per_head: bool, dtype: torch.dtype) -> None:
    check(make(case, dtype, DEVICE), weights_on_device(case, per_head), dtype)


LARGER = [
    *(Case((700, 333, 1), (700, 333, 1), "packed", heads=8, head_dim=d) for d in (64, 96, 128, 256)),
    *(Case((1500,), (1500,), heads=g, kv_heads=1, sparse=Streaming(100, 170), head_dim=128) for g in (1, 3, 8, 71)),
    *(Case((1, 9) * 30, (1, 9) * 30, "packed", heads=h, head_dim=128) for h in (4, 12)),  # more than a warp's lanes
    Case((400, 400), (2100, 900), "cached", heads=8, sparse=Triangle(16, 128, last_q=50), head_dim=128),
    Case((400, 400), (900, 77), "cached_per_head", heads=8, sparse=Streaming(128, 256, align=128), head_dim=64),
    Case((1024, 1024), (1024, 1024), heads=8, kv_heads=4, sparse=Streaming(128, 256), head_dim=128),
    Case((5000,), (5000,), heads=2, kv_heads=1, sparse=PUBLISHED, head_dim=128),
    Case((3000,), (3000,), heads=4, kv_heads=2, sparse=BlockSparse(name="every third"), head_dim=128),
    Case((3000,), (3000,), heads=4, kv_heads=2, sparse=BlockSparse(name="every third"), head_dim=64),
    # More tiles than thread blocks, of which the parts of some are one key block, or none.
    Case((1, 130, 129, 700) * 12, (1, 130, 129, 700) * 12, "packed", heads=16, kv_heads=4, head_dim=128),
    Case((160,) * 40, (410,) * 40, "cached", heads=8, sparse=Streaming(0, 128, align=128), head_dim=96),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_many_tiles(case: Case, dtype: torch.dtype) -> None:
    check(make(case, dtype, DEVICE), weights_on_device(case), dtype)


@pytest.mark.parametrize("lens", [(300, 300), (200, 500)], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_patterns_that_overlap_in_any_way(pair: str, lens: tuple[int, int]) -> None:
    case = Case((lens[0],) * 2, (lens[1],) * 2, heads=2, kv_heads=2, head_dim=32)
    x = make(case, torch.bfloat16, DEVICE)
    x.kwargs["full"], x.kwargs["sparse"] = (p(x) if callable(p) else p for p in PAIRS[pair])
    check(x, weights_on_device(case), torch.bfloat16)


def test_rows_of_which_the_sparse_branch_sees_nothing() -> None:
    x = make(Case((140,), (140,), heads=2, kv_heads=2, head_dim=64), torch.bfloat16, DEVICE)
    counts = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32, device=DEVICE)
    blocks = torch.tensor([[[[0], [1]], [[0], [0]]]], dtype=torch.int32, device=DEVICE)
    x.kwargs["sparse"] = BlockSparse(blocks, counts)
    w = torch.tensor([[0.25, 1.0]], device=DEVICE)
    check(x, w, torch.bfloat16)
    _, _, sparse, full_lse, sparse_lse = ops.mix(*mix_arguments(x, w))
    assert (sparse_lse[0, 0, :128] == -torch.inf).all() and not sparse[0, :128, 0].any()
    assert full_lse.isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_what_each_pattern_gives_is_what_attention_gives(layout: str, head_dim: int) -> None:
    lens = (290, 170) if layout == "packed" else (290, 290)
    case = Case(lens, lens, layout, head_dim=head_dim, sparse=Streaming(20, 70))
    x = make(case, torch.bfloat16, DEVICE)
    _, full, sparse, full_lse, sparse_lse = ops.mix(*mix_arguments(x, weights_on_device(case)))
    for got, lse, route in ((full, full_lse, 0), (sparse, sparse_lse, 1)):
        chosen = torch.full((2,), route, device=DEVICE)
        x.kwargs["scale"] = 0.25
        want, want_lse = flux_ext.attention(x.q, x.k, x.v, chosen, return_lse=True, **x.kwargs)
        assert relative_error(got, want) < torch.finfo(torch.bfloat16).eps / 4, "sums in another order"
        torch.testing.assert_close(lse, want_lse)


def test_the_same_bits_every_time() -> None:
    case = Case((700, 700), (700, 700), heads=4, kv_heads=2, head_dim=128, sparse=Streaming(30, 100))
    x = make(case, torch.bfloat16, DEVICE)
    of = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    first, second = (gradients(flux_ext.attention, x, weights_on_device(case), torch.bfloat16, of) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(second[name], t), name


def test_a_weight_outside_0_to_1_gives_nan_to_its_head_alone() -> None:
    x = make(Case((140,), (140,), heads=4, kv_heads=2, head_dim=64), torch.bfloat16, DEVICE)
    out = flux_ext.attention(x.q, x.k, x.v, torch.tensor([[0.5, 1.5]], device=DEVICE), **x.kwargs)
    assert out[:, :, :2].isfinite().all() and out[:, :, 2:].isnan().all()


def arguments(layout: str, per_head: bool) -> tuple[Inputs, Tensor]:
    case = Case((12, 12), (12, 12), layout, head_dim=16, sparse=FEW)
    x = make(case, torch.bfloat16, DEVICE)
    x.q, x.k, x.v = (t.nan_to_num().requires_grad_() for t in (x.q, x.k, x.v))
    return x, weights_on_device(case, per_head).requires_grad_()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck(layout: str, per_head: bool) -> None:
    x, w = arguments(layout, per_head)
    torch.library.opcheck(ops.mix.default, mix_arguments(x, w))
    with torch.no_grad():
        given = mix_arguments(x, w)
        q, k, v, weight, *rest, page_table = (t.detach() if isinstance(t, Tensor) else t for t in given)
        _, *branches = ops.mix(q, k, v, weight, *rest, page_table)
        backward = [torch.randn_like(q), q, k, v, *branches, weight, *rest]
    torch.library.opcheck(ops.mix_backward.default, backward)


def test_compile_is_one_graph_with_the_same_gradients() -> None:
    x, w = arguments("batched", per_head=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return flux_ext.attention(q * 2, k, v, w, sparse=FEW)

    leaves = [x.q, x.k, x.v, w]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves).float().square().sum(), leaves) for f in (compiled, attend))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (3, lambda t: t.cpu(), r"route must be on the device of q \(cuda:0\), got cpu"),
        (3, lambda t: t.double(), "a fractional route must be float32 here, got"),
        (4, lambda p: [0, 5, 0, 1, 0, *p[5:]], "full must show every key on CUDA"),
        (0, lambda t: t.float(), "k must have the dtype of q"),
    ],
)
def test_bad_arguments(place: int, change: Any, message: str) -> None:
    x, w = arguments("batched", per_head=True)
    given = list(mix_arguments(x, w.detach()))
    given[place] = change(given[place])
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.mix(*given)


def test_bad_branches_of_the_gradient() -> None:
    x, w = arguments("batched", per_head=True)
    with torch.no_grad():
        q, k, v, weight, *rest, page_table = mix_arguments(x, w)
        _, full, sparse, full_lse, sparse_lse = ops.mix(q, k, v, weight, *rest, page_table)
        with pytest.raises((ValueError, RuntimeError), match="sparse_lse must be like full_lse.* got float32 .*cpu"):
            ops.mix_backward(full, q, k, v, full, sparse, full_lse, sparse_lse.cpu(), weight, *rest)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "flux_ext" in str(func):
                called.append(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    def operators_of(length: int, head_dim: int = 64, **patterns: Any) -> list[str]:
        called.clear()
        x = make(Case((length,), (300,), "cached", head_dim=head_dim), torch.bfloat16, DEVICE)
        with Watch():
            flux_ext.attention(x.q, x.k, x.v, torch.tensor([0.3], device=DEVICE), **{**x.kwargs, **patterns})
        return [name for name in called if name in ("attend", "mix")]

    assert operators_of(200) == ["mix"]
    assert operators_of(200, full=Streaming(0, 100)) == ["attend", "attend"]
    monkeypatch.undo()
    assert operators_of(3) == ["attend", "attend"], "a few queries over a cache"
    assert operators_of(140) == ["attend", "attend"], "less than half as many queries as keys"
    assert operators_of(200) == ["mix"]
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert operators_of(200, head_dim=256) == (["attend", "attend"] if hopper else ["mix"])
    lists = torch.zeros((1, 2, 2, 1), dtype=torch.int32, device=DEVICE)
    for width in (64, 128):
        narrow = BlockSparse(lists, torch.ones((1, 2, 2), dtype=torch.int32, device=DEVICE), width)
        assert operators_of(200, sparse=narrow) == (["attend", "attend"] if hopper and width == 64 else ["mix"])
