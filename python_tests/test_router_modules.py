"""Routers whose layers something else replaced, and models whose weights are not parameters."""

import copy
from typing import Any

import pytest
import torch
from models import SMALL, patched_model, ragged, routes_and_logits, scramble, tiny
from torch import Tensor, nn

import flux_ext
from flux_ext import FluxConfig, get_routers
from flux_ext.models import families
from flux_ext.operators import reference
from flux_ext.routers.modules import HeadRouter, LayerRouter, Router, pool_sequences

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize")

KINDS = [LayerRouter, HeadRouter]


class Scaled(nn.Module):
    """A wrapper that changes what a linear layer computes."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


def scrambled(kind: type[Router]) -> Router:
    router = kind(16, 5)
    scramble(router)
    return router


def scaled(router: Router, factor: float) -> Router:
    """A copy whose weights hold the factor that :class:`Scaled` applies to its second layer."""
    router = copy.deepcopy(router)
    with torch.no_grad():
        for p in router.encoder[2].parameters():
            p.mul_(factor)
    return router


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("bounds", [(0, 0), (0, 3), (2, 9), (1, 23), (5, 6)], ids=str)
def test_pooling_is_that_of_the_reference(per_head: bool, bounds: tuple[int, int]) -> None:
    start, end = (
        torch.tensor([bounds[0], 0, 3], dtype=torch.int32),
        torch.tensor([bounds[1], 23, 17], dtype=torch.int32),
    )
    x = torch.randn(3, 23, 2, 16)
    x[0, bounds[1] :] = float("nan")  # rows that do not count are not looked at
    want = torch.stack([reference.pool(x[b, start[b] : end[b]], 5, per_head) for b in range(3)])
    torch.testing.assert_close(pool_sequences(x, 5, per_head, start, end), want)
    offset = torch.tensor([0, 23, 46], dtype=torch.int32)
    packed = pool_sequences(x.flatten(0, 1), 5, per_head, start + offset, end + offset)
    torch.testing.assert_close(packed, want)
    whole = torch.stack([reference.pool(y, 5, per_head) for y in x[1:]])
    torch.testing.assert_close(pool_sequences(x[1:], 5, per_head), whole)


def wrap(router: Router, how: str, factor: float) -> None:
    layer = router.encoder[2]
    if how == "module":
        router.encoder[2] = Scaled(layer, factor)
    elif how == "sequence":
        router.encoder = Scaled(router.encoder, factor)
    elif how == "hook":
        layer.register_forward_hook(lambda module, args, output: output * factor)
    elif how == "hook of the sequence":
        router.encoder.register_forward_hook(lambda module, args, output: output * factor)
    elif how == "forward":
        forward = layer.forward
        layer.forward = lambda x: forward(x) * factor
    elif how == "subclass":

        class Other(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * factor

        layer.__class__ = Other


@pytest.mark.parametrize("how", ["module", "sequence", "hook", "hook of the sequence", "forward", "subclass"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_into_or_around_a_layer_counts(kind: type[Router], how: str) -> None:
    router = scrambled(kind)
    want = scaled(router, 1.5)
    wrap(router, how, 1.5)
    assert not router.is_plain() and want.is_plain()
    x = torch.randn(2, 40, 2, 16)
    logits, route = router.decide(x)
    expected, expected_route = want.decide(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(route, expected_route) and route.dtype == expected_route.dtype
    assert not torch.allclose(logits, scrambled(kind).decide(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router(x), logits)
    with pytest.raises(ValueError, match="no plain weights"):
        router.weights()


def test_gradients_reach_through_a_wrapper() -> None:
    router = scrambled(LayerRouter)
    want = scaled(router, 1.5)
    wrap(router, "module", 1.5)
    x = torch.randn(2, 40, 2, 16)
    for r in (router, want):
        r(x).square().sum().backward()
    for a, b in zip(router.classifier.parameters(), want.classifier.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_a_parametrization_is_its_weight() -> None:
    router = scrambled(LayerRouter)
    want = copy.deepcopy(router)
    with torch.no_grad():
        want.encoder[2].weight.mul_(2)

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(router.encoder[2], "weight", Double())
    x = torch.randn(2, 40, 2, 16)
    torch.testing.assert_close(router(x), want(x))


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_lora_on_all_linear_layers(granularity: str) -> None:
    """Adapters on the routers take effect: as if their product had been added to the weights."""
    peft = pytest.importorskip("peft")
    model = patched_model(granularity=granularity)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")).eval()
    ids, mask = ragged()
    logits = routes_and_logits(model, input_ids=ids, attention_mask=mask)[1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and "flux_router" in name:
                p.normal_(0, 0.2)
    adapted = routes_and_logits(model, input_ids=ids, attention_mask=mask)
    assert not torch.allclose(adapted[1], logits)
    merged = model.merge_and_unload()
    assert all(router.is_plain() for router in get_routers(merged).layers)
    for a, b in zip(adapted, routes_and_logits(merged, input_ids=ids, attention_mask=mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- Weights that are no parameters


class Packed(nn.Module):
    """A linear layer as quantisations have it: its weights are buffers, or nothing that torch knows."""

    def __init__(self, linear: nn.Linear, buffers: bool) -> None:
        super().__init__()
        if buffers:
            self.register_buffer("qweight", linear.weight.detach().clone())
        else:
            self.packed = [linear.weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight if hasattr(self, "qweight") else self.packed[0])


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_an_attention_without_parameters(buffers: bool, granularity: str) -> None:
    plain = patched_model(granularity=granularity)
    ids, mask = ragged()
    want = routes_and_logits(plain, ids, attention_mask=mask)
    model = tiny()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name), buffers))
        assert not list(layer.self_attn.parameters())
    flux_ext.patch(model, routers=get_routers(plain))
    for a, b in zip(routes_and_logits(model, ids, attention_mask=mask), want, strict=True):
        torch.testing.assert_close(a, b)
    model.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_where_a_module_computes() -> None:
    empty, buffer, model = nn.Module(), nn.Module(), nn.Linear(2, 2, device="meta")
    buffer.register_buffer("b", torch.zeros(1))
    assert families.device_of(buffer) == families.device_of(empty, buffer) == torch.device("cpu")
    empty._hf_hook = type("Hook", (), {"execution_device": "cuda:1"})()  # type: ignore[assignment]
    assert families.device_of(empty, buffer) == torch.device("cuda:1")
    for module, whole in ((model, None), (model, buffer), (nn.Module(), model), (nn.Module(), None)):
        with pytest.raises(ValueError, match="no weights yet"):
            families.device_of(module, whole)


def int8(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="gone from this torch")
def test_dynamic_int8_before_and_after_patching() -> None:
    ids = torch.randint(2, 128, (2, 40))
    model = int8(tiny())
    want = model(ids).logits
    flux_ext.patch(model, FluxConfig(**SMALL))
    with flux_ext.routes(model, "full"):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-3)
    model.generate(ids, max_new_tokens=3)
    patched = patched_model()
    logits = routes_and_logits(patched, ids)[1]
    quantized = int8(patched)  # the routers' layers too
    assert not any(router.is_plain() for router in get_routers(quantized).layers)
    close = routes_and_logits(quantized, ids)[1]
    assert (close[:, 0] - logits[:, 0]).abs().max() < 0.2 * logits[:, 0].abs().max() and not torch.equal(close, logits)
    quantized.generate(ids, max_new_tokens=3)
    assert torch.equal(routes_and_logits(patched, ids)[1], logits)


def test_a_hook_of_the_backward_pass_is_called() -> None:
    router, seen = scrambled(LayerRouter), []
    router.encoder[0].register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0]))
    router(torch.randn(2, 40, 2, 16)).sum().backward()
    assert len(seen) == 1 and seen[0].abs().sum() > 0
