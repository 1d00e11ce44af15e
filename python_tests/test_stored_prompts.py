"""When a prompt comes into the cache: behind the rest of its layer, and not at all where its forward fails."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from models import SMALL, ragged, tiny
from test_cache import MIXED
from torch.distributed.utils import _apply_to_tensors
from transformers.models.llama.modeling_llama import LlamaMLP

import flux_ext
from flux_ext import FluxCache, FluxConfig, operators
from flux_ext.caches.host_copy import HostCopy
from flux_ext.caches.layer import FluxCacheLayer
from flux_ext.forward_context import ForwardContext


def test_a_prompt_is_stored_when_the_rest_of_its_layer_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing waits for the route, whose copy is launched before attention: a GPU then has attention and the
    feed-forward part to do."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    order: list[str] = []

    def note(owner: Any, name: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (order.append(name), call(*a, **k))[1])

    note(HostCopy, "__init__")
    note(operators, "attention_after_prompt")
    note(LlamaMLP, "forward")
    note(HostCopy, "wait")
    note(FluxCacheLayer, "store")
    layers = model.config.num_hidden_layers
    ids = torch.randint(2, 128, (1, 20))
    cache = model(ids, use_cache=True).past_key_values
    assert order == ["__init__", "attention_after_prompt", "forward", "store", "wait"] * layers
    order.clear()
    model(ids[:, :1], past_key_values=cache)
    assert order == ["store", "forward"] * layers  # before it is attended to, with all that came before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_behind_attention_stores_no_prompt(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither then nor in the next forward, over another cache; and no keys are kept."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (1, 20))
    cache = FluxCache(model.config, flux_ext.get_routers(model).config)

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(LlamaMLP, "forward", fail)
        model(ids, past_key_values=cache)
    other = model(ids, use_cache=True).past_key_values
    assert not any(layer.is_initialized or layer._prompt for layer in cache.layers)
    assert model(ids[:, :1], past_key_values=other).logits.isfinite().all()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


def test_a_prompt_is_stored_where_each_layer_gets_a_copy_of_the_context() -> None:
    """As FSDP makes them, where it casts what a layer is called with."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (1, 20))
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: _apply_to_tensors(lambda x: x, (args, kwargs)), with_kwargs=True
        )
    cache = model(ids, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 4


@pytest.mark.parametrize("layer", range(4))
def test_a_forward_within_a_forward_leaves_its_prompt_alone(layer: int) -> None:
    """As a hook may run the model once more, before any layer."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (1, 20))

    def another(*args: Any) -> None:
        handle.remove()
        model(ids[:, :5], use_cache=True)

    handle = model.model.layers[layer].register_forward_pre_hook(another)
    cache = model(ids, use_cache=True).past_key_values
    got = model(ids[:, :1], past_key_values=cache).logits
    longer = torch.cat([ids, ids[:, :1]], 1)
    torch.testing.assert_close(got, model(longer, use_cache=False).logits[:, -1:], rtol=1e-4, atol=3e-4)


def test_the_unused_end_of_a_page_is_never_read() -> None:
    """A prompt leaves there what follows its tokens: here, NaN."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, mask = ragged((43, 30, 7))
    with flux_ext.routes(model, MIXED):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    poisoned = copy.deepcopy(cache)
    for layer in poisoned.layers:
        pages = layer.pages
        for seq_head, length in enumerate(pages.length):
            page, used = pages.table[seq_head, (length - 1) // pages.page_size], (length - 1) % pages.page_size + 1
            pages.keys[page, used:] = pages.values[page, used:] = torch.nan
    step = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    want, got = (model(ids[:, :1], attention_mask=step, past_key_values=c).logits for c in (cache, poisoned))
    assert torch.equal(got, want) and want.isfinite().all()


def test_an_attention_module_that_does_not_attend() -> None:
    """After an error nothing is kept; without one, that nothing was stored is said."""
    layer = FluxCacheLayer(FluxConfig(**SMALL), 4, routed=False)
    k = torch.randn(1, 2, 9, 16)
    for finished, raises in (
        (False, contextlib.nullcontext()),
        (True, pytest.raises(RuntimeError, match="not attend")),
    ):
        layer.begin(ForwardContext())
        layer.set_route(torch.zeros(1, 2, dtype=torch.int32))
        layer.update(k, k)
        with raises:
            assert layer.end(finished) is None
        assert not layer.is_initialized and layer._prompt is None
