"""Routers whose first layer is fitted to the pooled states: they see what differs between inputs."""

import contextlib
import copy

import pytest
import tiny_training
import torch

import flux_ext
from flux_ext.routers.modules import HeadRouter, LayerRouter
from flux_ext.training import PackedCollator, PaddedCollator, Recipe, start
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
    assert (seen - seen.mean(0)).flatten(0, 1).std() > 0.5
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


def fresh(granularity):
    m = tiny_training.model(granularity)
    config = flux_ext.get_routers(m).config
    flux_ext.unpatch(m)
    return flux_ext.patch(m, config)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("packed", [False, True])
def test_training_starts_from_whitened_states(tmp_path, granularity, packed) -> None:
    """Of the prompts asked for, taken evenly; once, and not again where a checkpoint is resumed."""
    m, data = fresh(granularity), tiny_training.dataset(12)
    rows = [data[i] for i in (0, 2, 4, 7, 9)]
    want = [copy.deepcopy(r) for r in flux_ext.get_routers(m).layers]
    for router, states in zip(want, pooled_states(m, [PaddedCollator()(rows)]), strict=True):
        whiten(router, states)
    options = {"recipe": Recipe(whiten=5), "data": data, "packed": packed, "learning_rate": 0.0, "max_steps": 1}
    t = tiny_training.trainer(tmp_path, m, save_strategy="steps", save_steps=1, **options)
    plain = [r.encoder[0].weight.clone() for r in t.routers.layers]
    for again in range(2):
        with pytest.warns(UserWarning, match="whiten=5 has no effect") if again else contextlib.nullcontext():
            t.train()
        for router, expected, before in zip(t.routers.layers, want, plain, strict=True):
            torch.testing.assert_close(router.encoder[0].weight, expected.encoder[0].weight, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(router.encoder[0].bias, expected.encoder[0].bias, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(router.encoder[0].weight, before, rtol=0.1)
    weights = [r.encoder[0].weight.clone() for r in t.routers.layers]
    other = tiny_training.trainer(tmp_path, fresh(granularity), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(r.encoder[0].weight, w) for r, w in zip(other.routers.layers, weights, strict=True))


def test_trained_routers_keep_their_first_layer(tmp_path) -> None:
    m = tiny_training.model()  # whose last bias is not a new router's
    before = [r.encoder[0].weight.clone() for r in flux_ext.get_routers(m).layers]
    t = tiny_training.trainer(tmp_path, m, Recipe(whiten=4), learning_rate=0.0, max_steps=1)
    with torch.no_grad():
        for router in t.routers.layers:
            router.classifier[-1].bias[0] = 0.1
    with pytest.warns(UserWarning, match="whiten=4 has no effect: the routers are not new"):
        t.train()
    assert all(torch.equal(r.encoder[0].weight, w) for r, w in zip(t.routers.layers, before, strict=True))


def test_what_cannot_be_measured_changes_no_router(tmp_path) -> None:
    t = tiny_training.trainer(tmp_path, fresh("layer"), Recipe(whiten=4), learning_rate=0.0, max_steps=1)
    before = [r.encoder[0].weight.clone() for r in t.routers.layers]
    states, seen = start.pooled_states, []

    def broken(*args):
        seen.append(states(*args))
        return [*seen[-1][:-1], seen[-1][-1] * torch.nan]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="not finite"):
        patch.setattr("flux_ext.training.trainer.pooled_states", broken)
        t.train()
    assert all(torch.equal(r.encoder[0].weight, w) for r, w in zip(t.routers.layers, before, strict=True))
    t.train()  # once it can
    assert all(r.is_whitened for r in t.routers.layers)


@pytest.mark.parametrize("whiten", [1, -3, 2.5])
def test_a_number_of_prompts_that_measures_nothing(whiten) -> None:
    with pytest.raises(ValueError, match=f"whiten must be 0 or at least 2 prompts, got {whiten}"):
        Recipe(whiten=whiten)


def test_bad_states() -> None:
    router = LayerRouter(8, 4)
    for pooled, message in (
        (torch.randn(1, 8), "at least 2 prompts, got 1"),
        (torch.randn(4, 6), r"pooled must be \[..., 8\], got \[4, 6\]"),
        (torch.full((4, 8), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            whiten(router, pooled)
    alike = 3 + 1e-7 * torch.randn(40, 8)
    whiten(router, alike)  # what differs is rounding, and is not blown up beyond all measure
    assert router.encoder[0](alike * 1.05).abs().max() < 1e3
