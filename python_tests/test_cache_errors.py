"""After an error: what was refused has changed nothing in a cache, and what failed half-way is not built on."""

import copy
from typing import Any

import pytest
import torch
from models import SMALL, tiny
from torch import Tensor

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.models.patching import decoder_layers, get_routers

FULL_FIRST = {"layer_types": ["full_attention", "sliding_attention"] * 2}
"""Layers with a window of their own come last: what fails in them, ours do not see."""


def patched(family: str, **changes: Any) -> Any:
    return flux_ext.patch(tiny(family, **changes), FluxConfig(**SMALL))


def new_cache(model: Any, kind: str = "dynamic") -> FluxCache:
    config = get_routers(model).config
    if kind == "static":
        return FluxStaticCache(model.config, config, 64, page_size=4)
    return FluxCache(model.config, config, page_size=4)


def feed(model: Any, cache: FluxCache, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits


def lengths(cache: FluxCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "dynamic", {}),
        ("llama", "static", {}),
        ("gemma3", "dynamic", {}),
        ("qwen2-sliding", "dynamic", FULL_FIRST),
        ("jamba", "dynamic", {}),
    ],
)
def test_a_step_that_failed_in_any_layer(family: str, kind: str, changes: Any, error: type[BaseException]) -> None:
    """Where layers differ, or may, because some of them count nothing: whatever the error was."""
    model = patched(family, **changes)
    ids = torch.randint(2, 128, (2, 20))

    def fail(*args: Any) -> None:
        raise error

    for layer in range(1, 4):
        cache = new_cache(model, kind)
        feed(model, cache, ids)
        handle = decoder_layers(model)[layer].register_forward_pre_hook(fail)
        with pytest.raises(error):
            feed(model, cache, ids[:, :1])
        handle.remove()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="an earlier forward failed half-way"):
                feed(model, cache, ids[:, :1])
        cache.reset()
        close(feed(model, cache, ids), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_that_failed_before_anything_was_stored(kind: str) -> None:
    model = patched("llama")
    ids, cache = torch.randint(2, 128, (2, 20)), new_cache(model, kind)
    feed(model, cache, ids)
    with pytest.raises(IndexError):
        feed(model, cache, torch.full((2, 1), 1000))
    close(feed(model, cache, ids[:, :1]), model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("changes", [{}, FULL_FIRST], ids=["sliding first", "full first"])
def test_a_mask_that_is_refused_changes_nothing(changes: Any) -> None:
    """Nor in a layer of transformers that comes before ours, and stores whatever the mask says."""
    model = patched("gemma3", **changes)
    ids, mask, cache = torch.randint(2, 128, (2, 60)), torch.ones(2, 61, dtype=torch.long), new_cache(model)
    mask[1, :5] = 0
    with flux_ext.routes(model, "sparse"):
        feed(model, cache, ids, attention_mask=mask[:, :60])
    before = lengths(cache)
    taken_back, shown = mask.clone(), torch.ones_like(mask)
    taken_back[0, 40:55] = 0
    for wrong, error, message in (
        (taken_back, RuntimeError, "takes back 15 tokens of sequence 0"),
        (shown, ValueError, "shows token 0 of sequence 1"),
        (mask[:, :60], ValueError, r"attention_mask must be \[2, >= 61\]"),
    ):
        with pytest.raises(error, match=message):
            feed(model, cache, ids[:, :1], attention_mask=wrong)
        assert lengths(cache) == before
    got = feed(model, cache, ids[:, :1], attention_mask=mask)
    with torch.no_grad(), flux_ext.routes(model, "sparse"):
        want = model(torch.cat([ids, ids[:, :1]], 1), attention_mask=mask, use_cache=False).logits[:, -1:]
    close(got, want)


@pytest.mark.parametrize("changes", [{}, FULL_FIRST], ids=["sliding first", "full first"])
def test_a_crop_that_is_refused_changes_nothing(changes: Any) -> None:
    model = patched("gemma3", **changes)
    ids, cache = torch.randint(2, 128, (1, 20)), new_cache(model)
    feed(model, cache, ids)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    assert lengths(cache) == [20] * 4
    close(feed(model, cache, ids[:, :1]), model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:])


def test_a_second_crop_reaches_no_further_back_than_was_recorded() -> None:
    """Layers with a sliding window keep no more than that after a crop; a cache that went on had too few keys there."""
    model = patched("gemma3")
    ids, cache = torch.randint(2, 128, (1, 30)), new_cache(model)
    cache.activate_past_recording()
    feed(model, cache, ids[:, :24])
    cache.crop(-4)
    feed(model, cache, ids[:, 20:23])
    with pytest.raises(RuntimeError, match=r"crop\(-4\) needs tokens that a layer with a sliding window has dropped"):
        cache.crop(-4)
    assert lengths(cache) == [23] * 4
    cache.crop(-3)
    close(feed(model, cache, ids[:, 20:]), model(ids, use_cache=False).logits[:, 20:])


@pytest.mark.parametrize("again", ["crop", "reset"])
def test_an_emptied_cache_takes_other_sequences_and_goes_on_recording(again: str) -> None:
    model = patched("gemma3")
    cache = new_cache(model)
    cache.activate_past_recording()
    for batch in (1, 3):
        ids = torch.randint(2, 128, (batch, 20))
        feed(model, cache, ids)
        cache.crop(-4)
        assert lengths(cache) == [16] * 4
        close(feed(model, cache, ids[:, 16:]), model(ids, use_cache=False).logits[:, 16:])
        cache.crop(-20) if again == "crop" else cache.reset()
        assert lengths(cache) == [0] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_positions_of_another_shape(family: str, shape: tuple[int, int], cached: bool) -> None:
    """One new token would take any number of positions, by broadcasting, and be stored as often."""
    model = patched(family)
    ids, cache = torch.randint(2, 128, (2, 20)), new_cache(model)
    feed(model, cache, ids)
    with pytest.raises(ValueError, match=r"position_ids must be \[2 or 1, 1\], got \[" + ", ".join(map(str, shape))):
        feed(model, cache if cached else None, ids[:, :1], position_ids=torch.full(shape, 20))
    assert lengths(cache) == [20] * 4


@pytest.mark.parametrize("changes", [{}, FULL_FIRST], ids=["sliding first", "full first"])
@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 2]), "of the 2 sequences that the cache holds, got 2"),
        (torch.tensor([-3, 0]), "of the 2 sequences that the cache holds, got -3"),
        (torch.tensor([True]), "of the 2 sequences that the cache holds, got a mask of 1"),
        (torch.tensor([True, False, False]), "of the 2 sequences that the cache holds, got a mask of 3"),
        (torch.tensor([0.0, 1.0]), r"integers \[n\] or a mask \[B\], got torch.float32 \[2\]"),
        (torch.tensor([[0, 1]]), r"integers \[n\] or a mask \[B\], got torch.int64 \[1, 2\]"),
    ],
    ids=lambda x: str(x.tolist()) if isinstance(x, Tensor) else "",
)
def test_a_selection_that_is_refused_changes_nothing(
    changes: Any, operation: str, indices: Tensor, message: str
) -> None:
    model = patched("gemma3", **changes)
    ids, cache = torch.randint(2, 128, (2, 20)), new_cache(model)
    feed(model, cache, ids)
    with pytest.raises(ValueError, match=f"indices must be {message}"):
        getattr(cache, operation)(indices)
    longer = torch.cat([ids, ids[:, :1]], 1)
    close(feed(model, cache, ids[:, :1]), model(longer, use_cache=False).logits[:, -1:])
    getattr(cache, operation)(torch.tensor([-1, 0]))  # from the end, as everywhere in Python
    longer = torch.cat([longer, ids[:, :1]], 1)[[1, 0]]
    close(feed(model, cache, longer[:, -1:]), model(longer, use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_made_for_other_settings(kind: str) -> None:
    """It would decode by its own pattern, whatever the model's is."""
    model, ids = patched("llama"), torch.randint(2, 128, (1, 20))
    make = FluxCache if kind == "dynamic" else lambda *args: FluxStaticCache(*args, max_cache_len=40)
    for config, difference in (
        (FluxConfig(**{**SMALL, "window": 32}), "window: 16 and 32"),
        (FluxConfig(**SMALL, decode="dense"), "decode: 'sparse' and 'dense'"),
        (FluxConfig(**SMALL, num_layers=3), "num_layers: 4 and 3"),
    ):
        with pytest.raises(ValueError, match=f"made for other settings than this model's .*{difference}"):
            feed(model, make(model.config, config), ids)
    with pytest.raises(ValueError, match="layers: 4 and 2"):
        feed(model, make(tiny("llama", num_hidden_layers=2).config, FluxConfig(**SMALL)), ids)
    with pytest.raises(ValueError, match="window: 16 and 32"):
        model.generate(ids, past_key_values=make(model.config, FluxConfig(**{**SMALL, "window": 32})), max_new_tokens=2)
    cache = make(model.config, FluxConfig(**SMALL))  # equal settings
    close(feed(model, copy.deepcopy(cache), ids), feed(model, cache, ids))
