"""The routers: published shapes, pooling, padding, loading."""

import pytest
import torch

from flux_ext.operators import reference
from flux_ext.routers.modules import HeadRouter, LayerRouter

ROUTERS = [LayerRouter, HeadRouter]


def test_published_parameter_counts():
    assert sum(p.numel() for p in LayerRouter(128).parameters()) == 592_002
    assert sum(p.numel() for p in HeadRouter(128).parameters()) == 263_682


@pytest.mark.parametrize("cls", ROUTERS)
def test_a_new_router_routes_everything_full(cls):
    assert (cls(64).decide(torch.randn(3, 300, 4, 64))[1] == 0).all()


def lively(cls, head_dim=16, pool_size=10):
    """A router whose decisions are not all alike."""
    router = cls(head_dim, pool_size)
    with torch.no_grad():
        for p in router.parameters():
            p.mul_(4)
        router.classifier[-1].bias.zero_()
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [0, 1, 9, 10, 19, 20, 21, 500])
@pytest.mark.parametrize("cls", ROUTERS)
def test_operator_is_the_reference(cls, length, weights, dtype):
    router = lively(cls).to(weights)
    x = torch.randn(3, length, 4, 16).to(dtype)
    logits, route = router.decide(x)
    want, _ = reference.route(x.double(), router.weights(), 10, router.per_head)
    torch.testing.assert_close(logits.double(), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(route, reference.decide(logits)) and route.dtype == torch.int32


@pytest.mark.parametrize("cls", ROUTERS)
def test_gradients(cls):
    router = lively(cls)
    start, end = torch.tensor([0, 3, 45], dtype=torch.int32), torch.tensor([50, 30, 49], dtype=torch.int32)
    x = torch.randn(3, 50, 4, 16, requires_grad=True)
    leaves = [x, *router.weights()]
    weight = torch.randn_like(router(x, start, end))
    got = torch.autograd.grad((router(x, start, end) * weight).sum(), leaves)
    logits, _ = reference.route(x, router.weights(), 10, router.per_head, start, end)
    for a, b in zip(got, torch.autograd.grad((logits * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", ROUTERS)
def test_a_prompt_gets_the_same_route_alone_padded_and_packed(cls):
    router = lively(cls)
    prompts = [torch.randn(n, 4, 16) for n in (7, 33, 1, 64)]
    alone = torch.cat([router(p[None]) for p in prompts])
    size = 70
    for left in (True, False):
        batch = torch.full((4, size, 4, 16), torch.nan)
        for row, p in zip(batch, prompts, strict=True):
            row[size - len(p) :] = p if left else row[size - len(p) :]
            if not left:
                row[: len(p)] = p
        lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
        bounds = {"seq_start": size - lens} if left else {"seq_end": lens}
        assert torch.equal(router(batch, **bounds), alone)
    bounds = torch.tensor([0, 7, 40, 41, 105], dtype=torch.int32)
    assert torch.equal(router(torch.cat(prompts), bounds[:-1], bounds[1:]), alone)


def published(router, prefix=""):
    names = {"encoder": "cls_feat_extractor", "classifier": "cls_router_head_agnostic"}
    return {
        prefix + names[key.split(".")[0]] + key[key.index(".") :]: value.clone()
        for key, value in router.state_dict().items()
    }


@pytest.mark.parametrize("cls", ROUTERS)
def test_published_names_load_bit_for_bit(cls):
    source = lively(cls)
    checkpoint = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    for layer, router in enumerate([cls(16, 10), source, cls(16, 10), *(cls(16, 10) for _ in range(9))]):
        checkpoint |= published(router, f"model.layers.{layer}.self_attn.mask_allocator.")
    for state, layer in ((published(source), None), (checkpoint, 1)):
        target = cls(16, 10)
        target.load_published(state, layer)
        for a, b in zip(target.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)
    target = cls(16, 10)
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(KeyError, match="layer must be given"):
        target.load_published(checkpoint)
    with pytest.raises(KeyError, match=r"no tensor .*layers\.40\."):
        target.load_published(checkpoint, 40)
    with pytest.raises(ValueError, match=r"has shape \[.*\], this router"):
        cls(24, 10).load_published(checkpoint, 1)
    broken = published(source)
    del broken["cls_router_head_agnostic.4.bias"]
    with pytest.raises(KeyError, match="no tensor"):
        target.load_published(broken)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), before, strict=True)), "nothing half done"


def test_ties_are_sparse_and_nan_is_full():
    inf = torch.inf
    logits = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [torch.nan, 0.0], [0.0, torch.nan], [inf, 0], [0, -inf]])
    assert reference.decide(logits).tolist() == [1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cls", ROUTERS)
def test_what_is_not_finite_is_routed_full(cls, value):
    """The decision of a prompt whose states have overflowed leaves nothing out, and no other one changes."""
    router = lively(cls)
    with torch.no_grad():
        router.classifier[-1].bias.copy_(torch.tensor([1e4, 0.0]))  # else sparse, whatever x is
    x = torch.randn(3, 50, 4, 16)
    clean, route = router.decide(x)
    assert route.all()
    x[1, 3, 2, 5] = value
    logits, spoilt = router.decide(x)
    twin, twin_route = reference.route(x, router.weights(), 10, router.per_head)
    at = (1, 2) if router.per_head else (1,)
    assert not logits[at].isfinite().any() and spoilt[at] == 0 and twin_route[at] == 0
    assert not twin[at].isfinite().any()
    logits[at], spoilt[at] = clean[at], 1
    assert torch.equal(logits, clean) and torch.equal(spoilt, route)


@pytest.mark.parametrize("cls", ROUTERS)
def test_states_that_overflow_half_precision_are_routed_full(cls):
    router = lively(cls).half()
    with torch.no_grad():
        router.classifier[-1].bias.copy_(torch.tensor([1e4, 0.0]))
    x = torch.full((2, 50, 4, 16), 6e4, dtype=torch.float16)
    assert router.decide(x)[1].all()  # large, but finite
    assert not router.decide(x * 2)[1].any()


def test_gradient_of_a_pool_larger_than_any_prompt() -> None:
    x = torch.randn(2, 12, 2, 16)
    begin, end = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([12, 9], dtype=torch.int32)
    grads = []
    for pool_size in (12, 2**31 - 1, 2**31):
        torch.manual_seed(0)
        router = lively(LayerRouter, pool_size=12)
        router.pool_size = pool_size
        y = x.clone().requires_grad_()
        router(y, begin, end)[:, 1].sum().backward()
        grads.append(y.grad)
    assert grads[0].abs().sum() > 0 and torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
