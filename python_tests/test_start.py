"""Routers whose first layer is fitted to the pooled states: they see what differs between inputs."""

import pytest
import tiny_training
import torch

import flux_ext
from flux_ext.router import HeadRouter, LayerRouter
from flux_ext.training import PackedCollator, PaddedCollator
from flux_ext.training.start import pooled_states, whiten


def test_a_layer_routers_first_layer_sees_centred_and_scaled_states() -> None:
    torch.manual_seed(0)
    router = LayerRouter(8, 4)
    pooled = 5 + 0.01 * torch.randn(40, 8) * torch.arange(1, 9)
    want = router.encoder[0]((pooled - pooled.mean(0)) / pooled.std(0))
    whiten(router, pooled)
    assert torch.allclose(router.encoder[0](pooled), want, atol=1e-2)


def test_prompts_and_heads_count_alike_in_head_routers() -> None:
    torch.manual_seed(0)
    router = HeadRouter(16, 4)
    own = 10 * torch.randn(3, 16)  # of the heads
    pooled = own + 0.1 * torch.randn(50, 3, 16)
    w = router.encoder[0].weight.detach().double().clone()
    whiten(router, pooled)
    fold = torch.linalg.lstsq(w, router.encoder[0].weight.detach().double()).solution  # weight = w @ fold
    seen = pooled.double() @ fold.T
    assert (seen - seen.mean(0)).flatten(0, 1).std(0).max() < 1.3  # prompts: about one in every dimension
    assert 0.5 < (seen - seen.mean(0)).flatten(0, 1).std()
    between = torch.linalg.svdvals(seen.mean(0) - seen.mean((0, 1))) / 2**0.5
    assert (between[:2] - 1).abs().max() < 0.1, between  # heads: one, along the two directions that tell three apart


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_states_are_those_of_the_prompts_alone(granularity) -> None:
    m = tiny_training.model(granularity)
    rows = tiny_training.batch_rows(tiny_training.dataset(6))
    padded = pooled_states(m, [PaddedCollator()(rows[:4]), PaddedCollator()(rows[4:])])
    packed = pooled_states(m, [PackedCollator()(rows)])
    changed = [{**r, "answer": [7] * 5} for r in rows]
    heads = (2,) if granularity == "head" else ()
    for a, b, c in zip(padded, packed, pooled_states(m, [PaddedCollator()(changed)]), strict=True):
        assert a.shape == (6, *heads, 8)
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)
    assert not any(r._forward_pre_hooks for r in flux_ext.get_routers(m).layers)


def test_bad_states() -> None:
    router = LayerRouter(8, 4)
    for pooled, message in (
        (torch.randn(1, 8), "pooled must be .*got \\[1, 8\\]"),
        (torch.randn(4, 6), "pooled must be .*got \\[4, 6\\]"),
        (torch.full((4, 8), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            whiten(router, pooled)
    constant = torch.ones(4, 8)
    whiten(router, constant)  # nothing differs: nothing is blown up beyond all measure
    assert router.encoder[0](constant).isfinite().all()
