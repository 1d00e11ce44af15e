"""Gradients through attention on a GPU: the matrix of cases against the reference in fp64, and what training does with
them (torch.compile, autocast, accumulation, the objectives with a backward pass)."""

from __future__ import annotations

import pytest
import tiny_training
import torch
from cases import FEW, STREAMING, Case, cases, make
from models import SMALL, ragged, tiny
from torch import Tensor

import flux_ext
from flux_ext import BlockSparse, Full, Streaming, Triangle
from flux_ext.models.patching import policy
from flux_ext.operators import reference
from flux_ext.operators.operands import AttendArguments, KeyValues, Routing
from flux_ext.training import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
ops = torch.ops.flux_ext


def assert_near(got: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """At most twice the error of plain PyTorch, or what rounding the result alone makes. Values are of the order of
    one, and where all terms cancel (a query that sees one key) what is left is the rounding of fp32."""
    assert got.isfinite().all(), what
    error, base = ((x.double() - exact).norm() for x in (got, plain))
    floor = torch.finfo(got.dtype).eps / 4 * exact.norm() + 16 * torch.finfo(torch.float32).eps * exact.numel() ** 0.5
    assert error <= 2 * base + floor, f"{what}: error {error:.2e}, of plain PyTorch {base:.2e}, of {exact.norm():.2e}"


def check(q: Tensor, k: Tensor, v: Tensor, route: Tensor | None, **options) -> None:
    """Gradients of hard routes, or of fractions with that of the route; rows that are NaN belong to no sequence."""
    mixed = route is not None and route.is_floating_point()
    real = [~x.isnan() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    if mixed:  # one sign throughout the sums of a route's gradient: where terms cancel, only rounding is left
        choice = torch.zeros(route.shape, dtype=torch.int32, device=route.device)
        full, sparse = (reference.attention(q.double(), k.double(), v.double(), choice + i, **options) for i in (0, 1))
        weight = weight.abs() * (sparse - full).sign().nan_to_num().to(q)

    def gradients(attention, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        by = route.detach().to(dtype).requires_grad_() if mixed else route
        out = attention(*leaves, by, **options)
        return torch.autograd.grad((out * weight.to(dtype)).nan_to_num().sum(), [*leaves, *([by] if mixed else [])])

    got, again = (gradients(flux_ext.attention, q.dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "the same call gives the same bits"
    exact, plain = gradients(reference.attention, torch.float64), gradients(reference.attention, q.dtype)
    for name, x, want, base, kept in zip("qkv", got, exact, plain, real, strict=False):
        assert not (x * ~kept).any(), f"grad of {name}: rows of no sequence have gradient 0"
        assert_near(x * kept, torch.where(kept, want, 0), torch.where(kept, base, 0), f"grad of {name}")
    if mixed:
        assert_near(got[3], exact[3], plain[3], "grad of the route")


CASES = [c for c in cases((64, 8, 40, 96, 128, 256)) if "paged" not in c.layout]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["hard", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case, kind: str, dtype: torch.dtype) -> None:
    x = make(case, dtype, DEVICE)
    route = x.route
    if kind == "mixed":
        if route is None:
            return
        route = torch.linspace(0.1, 0.9, route.numel(), dtype=dtype, device=DEVICE).view(route.shape)
    check(x.q, x.k, x.v, route, **x.kwargs)


LARGER = [
    *(Case((700, 333, 1), (700, 333, 1), "packed", heads=8, head_dim=d) for d in (64, 96, 128, 256)),
    *(Case((1500,), (1500,), heads=g, kv_heads=1, sparse=Streaming(100, 170), head_dim=128) for g in (1, 3, 8, 71)),
    *(Case((1, 9) * 30, (1, 9) * 30, "packed", heads=h, head_dim=128) for h in (4, 12)),  # more than a warp's lanes
    Case((400, 400), (2100, 900), "cached", heads=8, sparse=Triangle(16, 128, last_q=50), head_dim=128),
    Case((400, 400), (900, 77), "cached_per_head", heads=8, sparse=Streaming(128, 256, align=128), head_dim=64),
    *(
        Case((1024, 1024), (1024, 1024), heads=8, kv_heads=4, sparse=Streaming(128, 256), head_dim=d)
        for d in (96, 128, 256)
    ),
    Case((400, 400), (2100, 900), "cached", heads=6, sparse=Triangle(16, 128, last_q=50), head_dim=256),
    # Blocks of keys that add up the queries' gradient in order, beside heads that stream.
    *(
        Case((1500, 700, 64, 0), (1500, 700, 64, 0), x, heads=8, sparse=Streaming(128, 256), head_dim=128)
        for x in ("left_padded", "right_padded")
    ),
    *(Case((1100,), (1100,), heads=g, kv_heads=1, route="none", head_dim=128) for g in (1, 3, 16)),
    *(Case((900,), (n,), "cached", route="full", head_dim=d) for n, d in ((1500, 128), (300, 112))),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_gradients_of_many_tiles(case: Case, dtype: torch.dtype) -> None:
    x = make(case, dtype, DEVICE)
    check(x.q, x.k, x.v, x.route, **x.kwargs)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("width", (64, 128))
@pytest.mark.parametrize(
    ("q_len", "kv_len", "heads", "dim"),
    [
        (384, 384, 4, 64),
        (300, 555, 14, 64),
        (1, 333, 4, 64),
        (5000, 5000, 2, 64),
        (300, 555, 14, 128),
        (700, 700, 8, 256),
    ],
)
def test_gradients_of_block_lists(width: int, both: bool, q_len: int, kv_len: int, heads: int, dim: int) -> None:
    torch.manual_seed(q_len + width)
    kv_heads, q_blocks = 2, -(-q_len // 128)

    def lists(share: float) -> BlockSparse:
        blocks = torch.full((1, kv_heads, q_blocks, -(-kv_len // width)), 2**30, dtype=torch.int32)
        counts = torch.zeros(1, kv_heads, q_blocks, dtype=torch.int32)
        for h in range(kv_heads):
            for i in range(q_blocks):
                last = (kv_len - q_len + min((i + 1) * 128, q_len) - 1) // width
                chosen = [n for n in range(last + 1) if n in (0, last) or torch.rand(()) < share]
                counts[0, h, i] = len(chosen)
                blocks[0, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        return BlockSparse(blocks=blocks.to(DEVICE), counts=counts.to(DEVICE), width=width)

    q = torch.randn(1, q_len, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_len, kv_heads, dim, device=DEVICE, dtype=torch.bfloat16)
    route = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    full = {"full": lists(0.7)} if both else {}
    check(q, k, v, route, sparse=lists(0.2), **full)


@pytest.mark.parametrize("fractional", [False, True], ids=["hard", "mixed"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_len", "in_order"),
    [(128, 8, 256, True), (104, 8, 500, True), (128, 6, 256, False), (128, 8, 600, False), (64, 8, 256, False)],
)
def test_where_gradients_are_added_in_order(
    head_dim: int, heads: int, kv_len: int, in_order: bool, fractional: bool
) -> None:
    """Groups of 4 and of 3, and more than twice as many keys as queries: else results alone would not tell."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    q = torch.randn(1, 256, heads, head_dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, kv_len, 2, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    route = torch.zeros(1, device=DEVICE, dtype=torch.float32 if fractional else torch.int32)
    out = flux_ext.attention(q, k, v, route, sparse=Streaming(4, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        out.sum().backward()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if "backward_kernel" in event.name]
    ordered = [name for name in names if "ordered_backward_kernel" in name]
    assert names and len(ordered) == in_order, names
    assert not ordered or ("MixedWalks" in ordered[0]) == fractional, names


def test_any_layout_of_the_incoming_gradient() -> None:
    """An expanded one, of other strides, and off the 16 bytes that kernels read at a time."""
    x = make(Case((150,), (150,), head_dim=64), torch.bfloat16, DEVICE)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out = flux_ext.attention(*leaves, x.route, **x.kwargs)
    ones = torch.ones_like(out)
    wide = torch.ones(*out.shape[:-1], 67, device=DEVICE, dtype=out.dtype)[..., 1:65]
    want = torch.autograd.grad(out, leaves, ones, retain_graph=True)
    for grad in (
        torch.ones((), device=DEVICE, dtype=out.dtype).expand_as(out),
        wide,
        ones.transpose(1, 2).clone().transpose(1, 2),
    ):
        for a, b in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), want, strict=True):
            assert torch.equal(a, b)


def test_rows_that_start_at_no_multiple_of_16_bytes() -> None:
    q, k, v = (torch.randn(2, 77, h, 67, device=DEVICE).bfloat16()[..., 1:-2] for h in (6, 3, 3))
    check(q, k, v, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), sparse=STREAMING)


def test_what_has_no_gradient_is_refused() -> None:
    x = make(Case((9,), (40,), "paged", head_dim=64), torch.bfloat16, DEVICE)
    out = flux_ext.attention(x.q.requires_grad_(), x.k, x.v, x.route, **x.kwargs)
    with pytest.raises(RuntimeError, match="page_table.* has no gradient"):
        out.sum().backward()
    q, *rest = arguments()
    out, lse = ops.attend(q, *rest)
    with pytest.raises(ValueError, match=r"lse must be on the device of q \(cuda:0\), got cpu"):
        ops.attend_backward(out, q, *rest[:2], out, lse.cpu(), *rest[2:-1])
    with pytest.raises(ValueError, match="grad_out must have the dtype of q"):
        ops.attend_backward(out.float(), q, *rest[:2], out, lse, *rest[2:-1])


def arguments(layout: str = "batched", grad: bool = False) -> list:
    x = make(Case((150, 150), (150, 150), layout, head_dim=64), torch.bfloat16, DEVICE)
    bounds = [x.kwargs["cu_seqlens"][:-1], x.kwargs["cu_seqlens"][1:]] * 2 if layout == "packed" else [None] * 4
    q, k, v = (t.nan_to_num().requires_grad_(grad) for t in (x.q, x.k, x.v))
    patterns = [*flux_ext.Full().numbers(), 0, *FEW.numbers(), 0]
    return list(AttendArguments(q, k, v, x.route, patterns, None, None, None, None, 0.25, *bounds, None))


@pytest.mark.parametrize("fractional", [False, True])
def test_keys_of_two_sequences_have_no_gradient(fractional: bool) -> None:
    q, k, v = (torch.randn(300, h, 64, device=DEVICE, dtype=DTYPES[0], requires_grad=True) for h in (4, 2, 2))
    q_begin, q_end, kv_begin, kv_end = torch.tensor(
        [[0, 100], [100, 300], [0, 80], [100, 300]], dtype=torch.int32, device=DEVICE
    )
    route = torch.tensor([0.3, 0.6] if fractional else [0, 1], device=DEVICE)
    attend = flux_ext.operators.mix if fractional else flux_ext.operators.attend
    out = attend(q, KeyValues(k, v, kv_begin, kv_end), Routing(route, Full(), STREAMING), 0.125, q_begin, q_end)
    grad_q, *gradients = torch.autograd.grad((out if fractional else out[0]).sum(), (q, k, v))
    assert grad_q.isfinite().all()
    for x in gradients:
        assert x[80:100].isnan().all() and x[:80].isfinite().all() and x[100:].isfinite().all()


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck(layout: str) -> None:
    torch.library.opcheck(ops.attend.default, arguments(layout, grad=True))
    q, k, v, *rest, page_table = arguments(layout)
    out, lse = ops.attend(q, k, v, *rest, page_table)
    torch.library.opcheck(ops.attend_backward.default, [torch.randn_like(out), q, k, v, out, lse, *rest])


@pytest.mark.parametrize("fractional", [False, True], ids=["hard", "mixed"])
def test_compile_is_one_graph_with_the_same_gradients(fractional: bool) -> None:
    q, k, v, route, *_ = arguments(grad=True)
    if fractional:
        route = torch.full(route.shape, 0.25, device=DEVICE, requires_grad=True)

    def attend(q, k, v, route):
        return flux_ext.attention(q * 2, k, v, route, sparse=FEW)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted = [q, k, v, *([route] if fractional else [])]
    grads = [torch.autograd.grad(f(q, k, v, route).float().square().sum(), wanted) for f in (compiled, attend)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_a_step_in_parts_adds_up_to_the_whole() -> None:
    """Gradient accumulation: backward passes add to the same leaves, and bf16 sums differ by their rounding alone."""
    x = make(Case((130, 130), (130, 130), head_dim=64), torch.bfloat16, DEVICE)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    flux_ext.attention(*leaves, x.route, **x.kwargs).square().sum().backward()
    whole = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    for i in range(2):
        flux_ext.attention(*(t[i : i + 1] for t in leaves), x.route[i : i + 1], **x.kwargs).square().sum().backward()
    assert all(torch.equal(t.grad, want) for t, want in zip(leaves, whole, strict=True))


def router_gradients(device: str, autocast: bool) -> Tensor:
    """Of a patched fp32 model whose routes are the routers' fractions."""
    model = flux_ext.patch(tiny("llama").to(device), flux_ext.FluxConfig(**SMALL))
    torch.manual_seed(0)
    ids, mask = (t.to(device) for t in ragged())

    def fractions(layer: int, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)[..., 0]

    with torch.autocast(device, torch.bfloat16, enabled=autocast), policy(model, fractions):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    loss = logits.float().log_softmax(-1)[..., 5][mask.bool()].mean()
    routers = list(flux_ext.get_routers(model).parameters())
    return torch.cat([g.flatten().cpu() for g in torch.autograd.grad(loss, routers)])


def test_autocast_trains_an_fp32_model() -> None:
    want = router_gradients("cpu", autocast=False)
    got = router_gradients(DEVICE, autocast=True)
    assert want.norm() > 0 and got.dtype == torch.float32
    assert (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", ["soft", "straight_through", "even_odds"])
def test_the_objectives_with_a_backward_pass_train(tmp_path, objective: str, packed: bool, checkpointing: bool) -> None:
    """The first step's gradient of the routers is that of the same model on the CPU, and the routers move.

    The weights are small: then rounding to bf16 makes 1 to 3 % of the gradient, on the CPU too, and not half of it.
    """
    grads: dict[str, list[Tensor]] = {"cpu": [], DEVICE: []}
    for device, seen in grads.items():
        m = tiny_training.model()
        routers = set(flux_ext.get_routers(m).parameters())
        with torch.no_grad():
            for weight in set(m.parameters()) - routers:
                weight.div_(3)
        before = tiny_training.snapshot(flux_ext.get_routers(m))
        trainer = tiny_training.trainer(
            tmp_path / device,
            m,
            Recipe(objective=objective, targets={"a": 0.5}, whiten=0),
            packed=packed,
            max_steps=2,
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            gradient_checkpointing=checkpointing,
            callbacks=[tiny_training.Grab(seen)],
        )
        trainer.train()
        after = tiny_training.snapshot(flux_ext.get_routers(m))
        assert all(p.isfinite().all() for p in after.values())
        assert any(not torch.equal(before[name].cpu(), p.cpu()) for name, p in after.items())
    want, got = grads["cpu"][0], grads[DEVICE][0].float().cpu()
    assert want.norm() > 0 and (got - want).norm() < 0.08 * want.norm()
