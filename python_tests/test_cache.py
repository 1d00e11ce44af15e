"""The cache: what is dropped, that dropping changes nothing, and every operation transformers asks of a cache."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL, ragged, tiny
from torch import Tensor
from transformers import DynamicCache, StaticCache

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.caches.layer import FluxCacheLayer
from flux_ext.caches.layout import PageLayout
from flux_ext.forward_context import ForwardContext
from flux_ext.operators.patterns import dense_mask


@pytest.fixture(autouse=True)
def nan_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that a page's unused end cannot hide."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MIXED = torch.tensor(
    [
        [[0, 0], [0, 1], [1, 1], [1, 0]],
        [[0, 1], [1, 1], [1, 1], [0, 1]],
        [[1, 1], [1, 1], [0, 0], [1, 1]],
    ],
    dtype=torch.int32,
)
"""Routes [B, L, Hkv]: even the KV heads of one sequence differ."""


@pytest.fixture(scope="module")
def model() -> Any:
    return flux_ext.patch(tiny("qwen3"), FluxConfig(**SMALL))


def new_cache(model: Any, page_size: int = 4) -> FluxCache:
    return FluxCache(model.config, flux_ext.get_routers(model).config, page_size=page_size)


def whole(model: Any, ids: Tensor, routes: Tensor) -> Tensor:
    """Logits of one forward without a cache: the pattern on everything."""
    with flux_ext.routes(model, routes):
        return model(ids, use_cache=False).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("chunks", [(60, 1, 1, 1), (1,) * 30, (25, 16, 19, 1), (7, 40, 1, 12)], ids=str)
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_chunks_equal_one_forward(chunks: tuple[int, ...], align: int, page_size: int) -> None:
    model = flux_ext.patch(tiny("qwen3"), FluxConfig(align=align, **SMALL))
    ids = torch.randint(2, 128, (3, sum(chunks)))
    cache, outputs, start = new_cache(model, page_size), [], 0
    for n in chunks:
        with flux_ext.routes(model, MIXED):
            outputs.append(model(ids[:, start : start + n], past_key_values=cache).logits)
        start += n
        assert cache.get_seq_length() == start
    close(torch.cat(outputs, 1), whole(model, ids, MIXED))
    assert torch.equal(cache.routes, MIXED)


@pytest.mark.parametrize("sink, window, align, page_size", [(4, 16, 1, 4), (5, 9, 1, 4), (0, 8, 8, 16), (6, 24, 12, 8)])
def test_stored_tokens(sink: int, window: int, align: int, page_size: int) -> None:
    """A sparse head holds sink + window + align - 1, and less than a page at the sink's end and a unit of dropping."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(sink=sink, window=window, align=align))
    slack = (-sink) % page_size + math.lcm(align, page_size) - 1
    for length in (1, 20, 50, 200):
        cache = new_cache(model, page_size)
        with flux_ext.routes(model, MIXED[:1]):
            model(torch.randint(2, 128, (1, length)), past_key_values=cache)
            for step in range(20):
                model(torch.randint(2, 128, (1, 1)), past_key_values=cache)
                seen = length + step + 1
                needed = int(dense_mask(flux_ext.Streaming(sink, window, align), 1, seen + 1).sum()) - 1
                for i, layer in enumerate(cache.layers):
                    stored, sparse = layer.stored_tokens(), MIXED[:1, i].numpy() == 1
                    assert (stored[~sparse] == seen).all()
                    assert (stored[sparse] <= sink + window + align - 1 + slack + 1).all()
                    assert (stored[sparse] >= needed).all()


def test_bytes_of_a_sparse_layer_do_not_grow_with_the_prompt() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(sink=4, window=32))
    page, per_token = 8, 2 * 2 * 16 * 4  # keys and values, two heads, head_dim 16, four bytes

    def nbytes(route: str, length: int, steps: int = 24) -> list[int]:
        cache = new_cache(model, page)
        with flux_ext.routes(model, route):
            model(torch.randint(2, 128, (2, length)), past_key_values=cache)
            for _ in range(steps):
                model(torch.randint(2, 128, (2, 1)), past_key_values=cache)
        assert sum(layer.nbytes() for layer in cache.layers) == cache.nbytes()
        return [layer.nbytes() for layer in cache.layers]

    # 4 + 32 tokens are 5 pages; one more for the sink's last page, one for tokens not dropped yet, one ahead.
    for length in (100, 200, 400):
        assert all(b <= 2 * 8 * page * per_token for b in nbytes("sparse", length)), length
        full = (length + 24) * 2 * per_token
        assert all(full <= b <= 1.15 * full + 2 * 2 * page * per_token for b in nbytes("full", length))


def test_a_long_turn_gives_its_pages_back(model: Any) -> None:
    cache = new_cache(model)
    with flux_ext.routes(model, "sparse"):
        model(torch.randint(2, 128, (1, 40)), past_key_values=cache)
        before = cache.nbytes()
        model(torch.randint(2, 128, (1, 300)), past_key_values=cache)
        assert cache.nbytes() > 4 * before
        model(torch.randint(2, 128, (1, 1)), past_key_values=cache)
        assert cache.nbytes() <= 1.5 * before


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_hold_their_own_tokens(model: Any, side: str) -> None:
    """Padding is not stored, and a ragged batch continues like each sequence alone, also in uneven turns."""
    lengths, turn = (60, 33, 47), (5, 9, 7)
    ids, mask = ragged(lengths, side)
    more, more_mask = ragged(turn, side)
    last = torch.randint(2, 128, (3, 1))
    cache = new_cache(model)
    with flux_ext.routes(model, MIXED):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = [model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits]
        for tokens, valid in ((more, more_mask), (last, torch.ones_like(last))):
            mask = torch.cat([mask, valid], 1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            outputs.append(model(tokens, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    assert (cache.layers[0].stored_tokens()[0] == 60 + 5 + 1).all()
    joined, valid = torch.cat(outputs, 1), mask.bool()
    for b in range(3):
        alone = torch.cat([ids, more, last], 1)[b, valid[b]][None]
        close(joined[b, valid[b]], whole(model, alone, MIXED[b : b + 1])[0])


def test_reorder_repeat_and_select(model: Any) -> None:
    ids = torch.randint(2, 128, (3, 40))
    cache = new_cache(model)
    with flux_ext.routes(model, MIXED):
        model(ids, past_key_values=cache)
    order = torch.arange(3)

    def check(picked: Tensor) -> None:
        nonlocal ids, order
        order, ids = order[picked], torch.cat([ids[picked], torch.randint(2, 128, (len(picked), 1))], 1)
        assert cache.batch_size == len(picked) and torch.equal(cache.routes, MIXED[order])
        close(model(ids[:, -1:], past_key_values=cache).logits[:, -1], whole(model, ids, MIXED[order])[:, -1])

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    check(torch.arange(3).repeat_interleave(2))
    cache.batch_select_indices(torch.tensor([5, 1, 2]))
    check(torch.tensor([5, 1, 2]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    check(torch.tensor([0, 2]))


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("remove", [1, 7, 30])
def test_crop(align: int, remove: int) -> None:
    model = flux_ext.patch(tiny("qwen3"), FluxConfig(align=align, **SMALL))
    ids = torch.randint(2, 128, (3, 60))
    cache = new_cache(model)
    cache.activate_past_recording()
    with flux_ext.routes(model, MIXED):
        model(ids, past_key_values=cache)
    assert (cache.layers[2].stored_tokens() == 60).all()
    cache.crop(-remove)
    assert cache.get_seq_length() == 60 - remove
    assert (cache.layers[2].stored_tokens()[0] <= 4 + 16 + align - 1 + math.lcm(align, 4)).all()
    again = model(ids[:, 60 - remove :], past_key_values=cache).logits
    close(again, whole(model, ids, MIXED)[:, 60 - remove :])


def test_crop_of_the_last_forward_needs_no_recording(model: Any) -> None:
    ids = torch.randint(2, 128, (3, 70))
    cache = new_cache(model)
    with flux_ext.routes(model, MIXED):
        model(ids[:, :50], past_key_values=cache)
    model(ids[:, 50:60], past_key_values=cache)
    cache.crop(-10)
    close(model(ids[:, 50:], past_key_values=cache).logits, whole(model, ids, MIXED)[:, 50:])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-40)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(5)
    with pytest.raises(ValueError, match="has seen 70 tokens"):
        cache.crop(-100)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("side", ["left", "right"])
def test_crop_counts_padding(model: Any, side: str) -> None:
    """What is cropped are slots: of a sequence whose last ones were padding, fewer tokens or none."""
    ids, mask = ragged((20, 12), side)
    more, ones = torch.randint(2, 128, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    cache = new_cache(model)
    with flux_ext.routes(model, "full"):
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-15)
        kept = mask[:, :5].sum(1)
        assert cache.layers[0].stored_tokens()[:, 0].tolist() == kept.tolist()
        mask = torch.cat([mask[:, :5], ones], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        got = model(more, attention_mask=mask, position_ids=position[:, 5:], past_key_values=cache).logits
        for b in range(2):
            alone = torch.cat([ids[b, :5][mask[b, :5].bool()], more[b]])[None]
            close(got[b], whole(model, alone, torch.zeros(1, 4, 2, dtype=torch.int32))[0, -8:])


def test_crop_of_everything_forgets_the_route(model: Any) -> None:
    cache, ids = new_cache(model), torch.randint(2, 128, (2, 12))
    for route in ("full", "sparse"):
        with flux_ext.routes(model, route):
            model(ids, past_key_values=cache)
        assert (cache.routes == int(route == "sparse")).all()
        cache.crop(-12)
        assert cache.get_seq_length() == 0 and cache.nbytes() == 0


def test_a_cache_made_in_inference_mode_goes_on_outside(model: Any) -> None:
    ids = torch.randint(2, 128, (3, 70))
    cache = new_cache(model)
    with torch.inference_mode(), flux_ext.routes(model, MIXED):
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:55], past_key_values=cache)
        cache.reorder_cache(torch.arange(3))
    want = whole(model, ids, MIXED)
    for t in (55, 56):
        close(model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0], want[:, t])
    cache.reorder_cache(torch.arange(3))
    with torch.inference_mode():
        close(model(ids[:, 57:], past_key_values=cache).logits, want[:, 57:])


def test_reset(model: Any) -> None:
    cache = new_cache(model)
    ids = torch.randint(2, 128, (2, 30))
    with flux_ext.routes(model, "sparse"):
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes() == 0
        close(model(ids, past_key_values=cache).logits, first)
    with pytest.raises(RuntimeError, match="before the first forward"):
        _ = new_cache(model).routes


def test_other_caches_are_refused(model: Any) -> None:
    ids = torch.randint(2, 128, (1, 10))
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        with pytest.raises(TypeError, match="FluxCache"):
            model(ids, past_key_values=cache)
        with pytest.raises(TypeError, match="FluxCache"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)


def test_the_cache_is_refused_outside_a_patched_model() -> None:
    model = tiny("llama")
    with pytest.raises(RuntimeError, match="patched"):
        model(torch.randint(2, 128, (1, 10)), past_key_values=FluxCache(model.config, FluxConfig(**SMALL)))
    flux_ext.patch(model, FluxConfig(**SMALL))
    cache = model(torch.randint(2, 128, (1, 10))).past_key_values
    flux_ext.unpatch(model)
    with pytest.raises(RuntimeError, match="patched"):
        model(torch.randint(2, 128, (1, 1)), past_key_values=cache)


def test_a_fractional_route_has_no_cache(model: Any) -> None:
    with flux_ext.routes(model, torch.full((4,), 0.3)), pytest.raises(ValueError, match="use_cache=False"):
        model(torch.randint(2, 128, (1, 10)))


@pytest.mark.parametrize("page_size", [1, 4, 6])
@pytest.mark.parametrize("pattern", [flux_ext.Streaming(5, 9), flux_ext.Streaming(0, 12, align=4)], ids=str)
def test_the_gap_is_what_no_later_query_sees(pattern: flux_ext.Streaming, page_size: int) -> None:
    """In whole units; of numbers, arrays and tensors."""
    layout = PageLayout(pattern, page_size)
    sink, unit = -(-pattern.sink // page_size) * page_size, math.lcm(pattern.align, page_size)
    assert (layout.sink_tokens, layout.sink_pages * page_size, layout.unit) == (sink, sink, unit)
    seen = dense_mask(pattern, 150, 150)  # by token, of every query
    unseen = [int((~seen[p:, sink:].any(0)).int().cumprod(0).sum()) if p >= sink else 0 for p in range(100)]
    want = [n // unit * unit for n in unseen]
    positions = torch.arange(100)
    assert want[-1] > 0 and layout.gap(positions).tolist() == layout.gap(positions.numpy()).tolist() == want
    assert [layout.gap(p) for p in range(100)] == want


def test_pages_behind_the_sink_go_round_the_ring() -> None:
    layout = PageLayout(flux_ext.Streaming(5, 8), 4)
    places = layout.place(np.arange(8), np.array([[3], [9]]))
    assert places.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_random_operations_keep_every_token_in_place() -> None:
    """Lengths, pages and contents against lists of tokens, over random appends, crops and selections."""
    rng = np.random.default_rng(0)
    for align, page_size in ((1, 4), (4, 2), (6, 4)):
        config = FluxConfig(sink=5, window=12, align=align)
        layer = FluxCacheLayer(config, page_size, routed=True)
        route = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.int32)
        routes = route.numpy()
        true: list[list[float]] = [[], [], []]
        next_token, valid = 1.0, np.zeros((3, 0), bool)
        for _ in range(60):
            if layer.is_initialized and rng.random() < 0.25:
                picked = rng.integers(0, 3, 3)
                layer.select(picked)
                layer.history.select(picked)
                valid = valid[picked]
                true, routes = [list(true[i]) for i in picked], routes[picked]
                continue
            n = int(rng.integers(1, 25))
            begin = rng.integers(0, n, 3)
            k = torch.arange(next_token, next_token + 3 * n).view(3, 1, n, 1).expand(3, 2, n, 8)
            next_token += 3 * n
            new = np.arange(n) >= begin[:, None]
            valid = np.concatenate([valid, new], 1)
            context = ForwardContext(mask=torch.from_numpy(valid))
            layer.begin(context)
            if not layer.continues:
                layer.set_route(route)
            layer.update(k, -k)
            layer.prompt_attended()
            if prompt := layer.end(True):
                layer.store_prompt(*prompt, context)
            for b in range(3):
                true[b] += k[b, 0, begin[b] :, 0].tolist()
            if rng.random() < 0.3 and (remove := int(rng.integers(0, n))) < n:
                gone = valid[:, valid.shape[1] - remove :].sum(1)
                layer.crop(-remove)
                layer.history.crop(remove)
                true = [t[: len(t) - g] for t, g in zip(true, gone, strict=True)]
                valid = valid[:, : valid.shape[1] - remove]
            table, lengths = layer.pages.page_table(), layer.stored_tokens()
            assert len(np.unique(np.concatenate([layer.pages.free, *layer_pages(layer)]))) == len(layer.pages.keys)
            for b in range(3):
                for h in range(2):
                    pages = table[b, h].long()
                    stored = layer.pages.keys[pages].reshape(-1, 8)[: lengths[b, h], 0].tolist()
                    values = layer.pages.values[pages].reshape(-1, 8)[: lengths[b, h], 0].tolist()
                    assert values == [-x for x in stored]
                    gap = len(true[b]) - len(stored)
                    assert gap % math.lcm(align, page_size) == 0 and (gap == 0 or routes[b, h] == 1)
                    sink = layer.layout.sink_tokens if gap else 0
                    assert stored == true[b][:sink] + true[b][sink + gap :]


def layer_pages(layer: FluxCacheLayer) -> list[np.ndarray]:
    return [layer.pages.table[r, : layer.pages.held[r]] for r in range(len(layer.pages.held))]


@pytest.mark.parametrize("static", [False, True])
def test_padded_prompts_where_the_default_device_is_another(static: bool) -> None:
    config = tiny().config
    flux = FluxConfig(**SMALL)
    cache = FluxStaticCache(config, flux, max_cache_len=16) if static else FluxCache(config, flux)
    layer: Any = cache.layers[0]
    k = torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    with torch.device("meta"):
        layer.store(k, k, torch.zeros(2, 2, dtype=torch.int32, device="cpu"), mask)
    assert layer.stored_tokens().reshape(2, 2).tolist() == [[3, 3], [5, 5]]


@pytest.mark.parametrize("static", [False, True])
def test_the_summary_says_what_is_kept_and_what_a_dense_cache_would_have(model: Any, static: bool) -> None:
    flux = flux_ext.get_routers(model).config
    make = (lambda: FluxStaticCache(model.config, flux, 100, page_size=4)) if static else lambda: new_cache(model)
    cache, name = make(), "FluxStaticCache" if static else "FluxCache"
    assert repr(cache) == f"{name}(4 layers, empty)" and cache.dense_nbytes() == 0
    assert cache.summary() == "empty: nothing is routed or stored before the first forward"
    routes = MIXED.clone()
    routes[1] = routes[0]
    with flux_ext.routes(model, routes):
        model(torch.randint(2, 128, (3, 60)), past_key_values=cache)
    stock = StaticCache(model.config, 100) if static else DynamicCache(config=model.config)
    tiny("qwen3")(torch.randint(2, 128, (3, 60)), past_key_values=stock)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)
    kept = cache.nbytes()
    assert cache.dense_nbytes() == dense > kept
    assert repr(cache) == f"{name}(4 layers, 3 sequences, {kept / 1e6:.4f} MB)"
    assert cache.summary().splitlines() == [
        "3 sequences, 60 tokens; routed layers, first to last (F full, s sparse, m mixed heads):",
        "  Fmsm  2 sequences",
        "  ssFs  1 sequence",
        f"{kept / 1e6:.4f} MB of keys and values kept; a dense cache would have {dense / 1e6:.4f} MB "
        f"({kept / dense:.0%})",
    ]
    cache.reset()
    assert cache.summary().startswith("empty") and repr(cache) == f"{name}(4 layers, empty)"
