"""The CUDA router against the reference in fp64, over layouts, dtypes, widths and numbers of decisions."""

from __future__ import annotations

import pytest
import torch
from test_cuda import DEVICE, error_of, int32
from torch import Tensor

from flux_ext import operators
from flux_ext.operators import reference
from flux_ext.routers.modules import HeadRouter, LayerRouter, Router

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def check(x: Tensor, weights: list[Tensor], pool_size: int, per_head: bool, *bounds: Tensor | None) -> None:
    """Logits near the reference, the route theirs, and the same bits again."""
    logits, route = operators.route(x, weights, pool_size, per_head, *bounds)
    exact, _ = reference.route(x.double(), [w.double() for w in weights], pool_size, per_head, *bounds)
    assert error_of(logits, exact) < 1e-5
    assert torch.equal(route, reference.decide(logits))
    again, _ = operators.route(x, weights, pool_size, per_head, *bounds)
    assert torch.equal(logits, again)


def random_weights(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases of layers sizes[0] -> sizes[1] -> ... -> 2, that keep the size of what passes through."""
    found = []
    for n_in, n_out in zip(sizes, (*sizes[1:], 2), strict=True):
        found += [torch.randn(n_out, n_in, device=DEVICE) * 2 / n_in**0.5, torch.randn(n_out, device=DEVICE)]
    return [w.to(dtype) for w in found]


@pytest.mark.parametrize("weights", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("router", (LayerRouter, HeadRouter))
@pytest.mark.parametrize("layout", ("plain", "left", "right", "packed", "strided"))
def test_route(router: type[Router], dtype: torch.dtype, weights: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    heads, lens = 8, (500, 130, 1, 60, 0, 199)
    for dim in (128, 64, 12):
        module = router(dim).to(DEVICE, weights)
        begin = end = None
        if layout == "packed":
            x = torch.randn(sum(lens), heads, dim, device=DEVICE).to(dtype)
            ends = torch.tensor(lens).cumsum(0)
            begin, end = int32((ends - torch.tensor(lens)).tolist()), int32(ends.tolist())
        else:
            x = torch.randn(len(lens), max(lens), heads, dim, device=DEVICE).to(dtype)
            if layout == "left":
                begin = int32([max(lens) - n for n in lens])
            elif layout == "right":
                end = int32(lens)
            elif layout == "strided":
                x = torch.randn(len(lens), heads, max(lens), dim + 1, device=DEVICE).to(dtype)[..., 1:].transpose(1, 2)
        check(x, module.weights(), 100, module.per_head, begin, end)


@pytest.mark.parametrize("weights", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("batch", (1, 2, 3, 9, 17, 67, 150))
@pytest.mark.parametrize("router", (LayerRouter, HeadRouter))
def test_decisions(router: type[Router], batch: int, weights: torch.dtype) -> None:
    """From one decision to 1200: wide clusters, small ones, several decisions of one cluster, several rounds."""
    torch.manual_seed(batch)
    module = router(128).to(DEVICE, weights)
    x = torch.randn(batch, 210, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    end = torch.randint(0, 211, (batch,), device=DEVICE, dtype=torch.int32)
    check(x, [w.detach() for w in module.weights()], 100, module.per_head, None, None)
    check(x, [w.detach() for w in module.weights()], 100, module.per_head, end // 2, end)


WIDTHS = (
    (13, 37, 11, 19, 7),  # nothing is a multiple of 8
    (16, 40, 8, 24, 16),  # less than 8 inner outputs per block
    (8, 8, 8, 8, 8),  # most blocks of a cluster have nothing to do
    (24, 1000, 600, 520, 1032),  # wide where routers are narrow
    (96, 768, 192, 384, 96),
    (512, 2048, 512, 2048, 512),  # HeadRouter(512): the weights do not fit in shared memory
)


@pytest.mark.parametrize("weights", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(widths: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = random_weights(widths, weights)
    for batch, heads in ((1, 1), (1, 5), (6, 7), (40, 5)):
        x = torch.randn(batch, 33, heads, widths[0], device=DEVICE).to(dtype)
        for per_head in (False, True):
            check(x, tensors, 10, per_head, None, None)


def test_misaligned_tensors() -> None:
    """Tensors that start anywhere: views into one buffer, as an optimizer that flattens its parameters leaves them."""
    torch.manual_seed(0)
    sizes = (64, 256, 64, 256, 64)
    weights = random_weights(sizes, torch.bfloat16)
    for offset in (1, 4):
        flat = torch.cat([weights[0].new_zeros(offset), *[w.flatten() for w in weights]])
        views, at = [], offset
        for w in weights:
            views.append(flat[at : at + w.numel()].view(w.shape))
            at += w.numel()
        for batch in (1, 5):
            x = torch.randn(batch * 120 * 8 * 64 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(batch, 120, 8, 64)
            check(x, views, 50, True, None, None)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("batch", (2, 40))
def test_what_is_not_finite_stays_in_its_decision_and_is_full(batch: int, value: float) -> None:
    torch.manual_seed(0)
    weights = random_weights((64, 256, 64, 256, 64), torch.bfloat16)
    x = torch.randn(batch, 120, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    weights[-1].copy_(torch.tensor([1e4, 0.0]))  # sparse, whatever x is
    clean, route = operators.route(x, weights, 50, True)
    assert route.all()
    x[1, 3, 5, 7] = value
    logits, spoilt = operators.route(x, weights, 50, True)
    assert not logits[1, 5].isfinite().any() and spoilt[1, 5] == 0
    on_cpu = operators.route(x.cpu(), [w.cpu() for w in weights], 50, True)[1]
    assert torch.equal(on_cpu, spoilt.cpu())
    logits[1, 5], spoilt[1, 5] = clean[1, 5], route[1, 5]
    assert torch.equal(logits, clean) and torch.equal(spoilt, route)


def test_pooled_states() -> None:
    """The operator's first output, which the gradient needs."""
    torch.manual_seed(0)
    for batch in (1, 40):
        x = torch.randn(batch, 250, 8, 64, device=DEVICE, dtype=torch.bfloat16)
        weights = random_weights((64, 256, 64, 256, 64), torch.bfloat16)
        for per_head in (False, True):
            pooled = torch.ops.flux_ext.route(x, weights, 100, per_head, None, None)[0]
            rows = torch.cat([x[:, :100], x[:, -100:]], 1).double().mean(1)
            assert error_of(pooled, rows if per_head else rows.mean(1)) < 1e-6


def test_weights_written_just_before() -> None:
    """The router may start while the kernel before it runs: it must not read early what that one writes."""
    torch.manual_seed(0)
    weights = random_weights((128, 1024, 256, 512, 128), torch.bfloat16)
    x = torch.randn(1, 210, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    kept = [[w * (-1) ** i for i in range(6)] for w in weights]
    found = []
    for i in range(6):
        for w, values in zip(reversed(weights), reversed(kept), strict=True):
            w.copy_(values[i])
        found.append(operators.route(x, weights, 100, False)[0])
        found.append(operators.route(x, weights, 100, False)[0])
    torch.cuda.synchronize()
    for i in range(6):
        exact, _ = reference.route(x.double(), [values[i].double() for values in kept], 100, False)
        assert error_of(found[2 * i], exact) < 1e-5 and torch.equal(found[2 * i], found[2 * i + 1])
