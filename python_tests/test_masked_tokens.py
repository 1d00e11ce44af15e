"""Padding anywhere among the tokens that a cache is fed: what is masked is not stored, not seen, decides nothing."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from models import SMALL, ragged, scramble, tiny
from torch import Tensor
from transformers import DynamicCache

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.caches.layer import FluxCacheLayer
from flux_ext.caches.pages import PagedKeyValues
from flux_ext.models import model_patch
from flux_ext.models.patching import get_routers

BATCH, LENGTH = 3, 40
ROUTES = torch.tensor(
    [[[0, 0], [0, 1], [1, 1], [1, 0]], [[0, 1], [1, 1], [1, 1], [0, 1]], [[1, 1], [1, 1], [0, 0], [1, 1]]]
)


def new_cache(model: Any, kind: str) -> FluxCache:
    config = get_routers(model).config
    if kind == "static":
        return FluxStaticCache(model.config, config, 64, page_size=4)
    return FluxCache(model.config, config, page_size=4)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def feed(model: Any, cache: FluxCache, ids: Tensor, mask: Tensor, chunks: list[int]) -> Tensor:
    """Logits ``[B, T, V]``, chunk after chunk, each with the mask so far."""
    outputs, start = [], 0
    for n in chunks:
        rows = slice(start, start := start + n)
        kwargs = {"attention_mask": mask[:, :start], "position_ids": positions(mask)[:, rows]}
        outputs.append(model(ids[:, rows], past_key_values=cache, **kwargs).logits)
    assert int(cache.get_seq_length()) == start
    return torch.cat(outputs, 1)


def stock(family: str, ids: Tensor, mask: Tensor) -> Tensor:
    """One forward of the model before it is patched: its dense mask can have holes."""
    return tiny(family)(ids, attention_mask=mask, position_ids=positions(mask)).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-4)


def with_holes() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    between, random = mask.clone(), (torch.rand(BATCH, LENGTH) < 0.6).long()
    between[0, 3:5] = between[1, 20:33] = between[1, 36:38] = 0
    random[:, -1] = 1
    left = mask.clone()
    left[1, :9], left[2, :38] = 0, 0
    nothing_yet = left.clone()
    nothing_yet[:, :4] = 0
    return {"between": between, "random": random, "left": left, "nothing_yet": nothing_yet}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("which", ["between", "random", "left", "nothing_yet"])
def test_token_by_token_it_is_the_stock_model(which: str, kind: str) -> None:
    ids, mask = torch.randint(2, 128, (BATCH, LENGTH)), with_holes()[which]
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    cache = new_cache(model, kind)
    with flux_ext.routes(model, "full"), torch.no_grad():
        got = feed(model, cache, ids, mask, [1] * LENGTH)
        want = stock("llama", ids, mask)
    valid = mask.bool()
    close(got[valid], want[valid])
    assert torch.equal(torch.from_numpy(cache.layers[1].stored_tokens()[:, 0]), mask.sum(1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize("chunks", [[3, 2, 35], [5, 1, 14, 13, 3, 2, 2], [3, 2] + [1] * 35], ids=str)
def test_padding_between_turns_is_the_stock_model(chunks: list[int], family: str) -> None:
    """Turns of any size; layers with a sliding window of their own keep their padding, and do not see it."""
    ids, mask = torch.randint(2, 128, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 3:5] = 0
    if len(chunks) > 3:
        mask[1, 20:33] = mask[2, 36:38] = 0
    model = flux_ext.patch(tiny(family), FluxConfig(**SMALL))
    with flux_ext.routes(model, "full"), torch.no_grad():
        got = feed(model, new_cache(model, "dynamic"), ids, mask, chunks)
        want = stock(family, ids, mask)
    close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("align", [1, 8])
def test_sparse_rows_count_tokens(kind: str, align: int) -> None:
    """Sink and window are those of the sequence alone, without its padding."""
    ids, mask = torch.randint(2, 128, (BATCH, LENGTH)), with_holes()["random"]
    model = flux_ext.patch(tiny("qwen3"), FluxConfig(align=align, **SMALL))
    with torch.no_grad():
        with flux_ext.routes(model, ROUTES):
            got = feed(model, new_cache(model, kind), ids, mask, [1] * LENGTH)
        for b in range(BATCH):
            valid = mask[b].bool()
            with flux_ext.routes(model, ROUTES[b : b + 1]):
                close(got[b, valid], model(ids[b : b + 1, valid], use_cache=False).logits[0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_the_first_token_decides(kind: str, granularity: str) -> None:
    """Fed one by one, a sequence's route is that of its first token, whenever that comes."""
    model = flux_ext.patch(tiny("qwen3"), FluxConfig(granularity=granularity, route_on="first_chunk", **SMALL))
    torch.manual_seed(7)
    scramble(get_routers(model), 0.7)
    ids, mask = torch.randint(2, 128, (BATCH, LENGTH)), with_holes()["nothing_yet"]
    first = torch.stack([ids[b, mask[b].argmax()] for b in range(BATCH)])[:, None]
    with torch.no_grad():
        want = model(first).past_key_values.routes
        cache = new_cache(model, kind)
        got = feed(model, cache, ids, mask, [1] * LENGTH)
        assert 0 < want.float().mean() < 1, "the routers should mix"
        assert torch.equal(cache.routes, want)
        for b in range(BATCH):
            valid = mask[b].bool()
            with flux_ext.routes(model, want[b : b + 1]):
                close(got[b, valid], model(ids[b : b + 1, valid], use_cache=False).logits[0])


def test_chunked_prefill_by_single_tokens() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(route_on="first_chunk", **SMALL))
    scramble(get_routers(model), 0.7)
    ids, mask = ragged((30, 11, 19))
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, prefill_chunk_size=1, return_dict_in_generate=True, **kwargs)
    first = model(ids[torch.arange(3), mask.argmax(1)][:, None]).past_key_values.routes
    assert torch.equal(out.past_key_values.routes, first)
    with flux_ext.routes(model, first):
        assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **kwargs))


def chat(model: Any, cache: Any = None) -> tuple[Tensor, Any]:
    """Two turns of two sequences. The second one's answer ends after a token, and is padded as text until the first
    one's ends. Logits of the second turn's first answer token, and the cache."""
    torch.manual_seed(2)
    first, second = torch.randint(2, 128, (2, 12)), torch.randint(2, 128, (2, 3))
    ones = torch.ones_like(first)
    kwargs: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    free = tiny("llama").generate(first, attention_mask=ones, max_new_tokens=8, **kwargs).sequences[:, 12:]
    eos = next(t for t in free[1].tolist()[:3] if t not in free[0].tolist())
    kwargs |= {"eos_token_id": eos} | ({"past_key_values": cache} if cache is not None else {})
    out = model.generate(first, attention_mask=ones, max_new_tokens=8, **kwargs)
    kept = (out.sequences[:, 12:] != 0).long()
    assert kept[0].all() and not kept[1].all()
    mask = torch.cat([ones, kept, torch.ones_like(second)], 1)
    kwargs["past_key_values"] = out.past_key_values
    again = model.generate(
        torch.cat([out.sequences, second], 1), attention_mask=mask, max_new_tokens=4, output_logits=True, **kwargs
    )
    return again.logits[0], again.past_key_values


def test_an_answer_that_ended_early_is_the_stock_models() -> None:
    want, _ = chat(tiny("llama"))
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    with flux_ext.routes(model, "full"):
        got, _ = chat(model)
    close(got, want)


def test_sparse_rows_take_tokens_back_where_they_dropped_nothing() -> None:
    """Right where it can be; refused, before anything is changed, where dropped tokens would come into view again."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, mask = torch.randint(2, 128, (2, 50)), torch.ones(2, 50, dtype=torch.long)
    later = mask.clone()
    later[1, 33:45] = 0
    with torch.no_grad(), flux_ext.routes(model, ROUTES[:2]):
        cache = new_cache(model, "dynamic")
        model(ids[:, :45], attention_mask=mask[:, :45], past_key_values=cache)
        stored = [layer.stored_tokens().copy() for layer in cache.layers]
        with pytest.raises(RuntimeError, match="takes back 12 tokens of sequence 1 .*activate_past_recording"):
            model(ids[:, 45:], attention_mask=later, past_key_values=cache)
        assert cache.get_seq_length() == 45
        for layer, before in zip(cache.layers, stored, strict=True):
            assert (layer.stored_tokens() == before).all()
        cache = new_cache(model, "dynamic")
        cache.activate_past_recording()
        model(ids[:, :45], attention_mask=mask[:, :45], past_key_values=cache)
        got = model(ids[:, 45:], attention_mask=later, position_ids=positions(later)[:, 45:], past_key_values=cache)
    for b in range(2):
        with flux_ext.routes(model, ROUTES[b : b + 1]):
            valid = later[b].bool()
            close(got.logits[b], model(ids[b : b + 1, valid], use_cache=False).logits[0, -5:])


@pytest.mark.parametrize("gone", [slice(0, 3), slice(5, 6), slice(10, 20), slice(17, 21)], ids=str)
def test_any_tokens_can_be_taken_back(gone: slice) -> None:
    """From the beginning, the middle and the end, also twice; and the cache goes on, is cropped and reordered."""
    tokens = torch.randint(2, 128, (2, 30))

    def run(model: Any, cache: Any) -> tuple[Tensor, Tensor]:
        ids, mask = tokens, torch.ones(2, 30, dtype=torch.long)
        feed(model, cache, ids[:, :21], mask[:, :21], [21])
        mask[1, gone] = 0
        step = {"attention_mask": mask[:, :25], "position_ids": positions(mask)[:, 21:25]}
        model(ids[:, 21:25], past_key_values=cache, **step)
        cache.crop(-2)
        mask[0, 8] = 0
        cache.reorder_cache(torch.tensor([1, 0]))
        ids, mask = ids[[1, 0]], mask[[1, 0]]
        step = {"attention_mask": mask, "position_ids": positions(mask)[:, 23:]}
        return model(ids[:, 23:], past_key_values=cache, **step).logits, mask

    with torch.no_grad():
        want, _ = run(model := tiny("llama"), DynamicCache(config=model.config))
        flux_ext.patch(model, FluxConfig(**SMALL))
        with flux_ext.routes(model, "full"):
            got, mask = run(model, cache := new_cache(model, "dynamic"))
    close(got, want)
    assert torch.equal(torch.from_numpy(cache.layers[0].stored_tokens()[:, 0]), mask.sum(1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_masks_that_contradict_the_cache(kind: str) -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, mask = ragged((20, 12))
    token, ones = ids[:, :1], torch.ones(2, 21, dtype=torch.long)
    cache = new_cache(model, kind)
    model(ids, attention_mask=mask, past_key_values=cache)
    shown = "shows (token 0 of sequence 1, which was masked|other tokens of sequence 1)"
    for wrong, message in (
        (ones, shown),
        (torch.ones(2, 1), r"attention_mask must (be \[2, >= 21\]|cover all 21 tokens)"),
        (torch.ones(2, 20), r"attention_mask must (be \[2, >= 21\]|cover all 21 tokens)"),
        (torch.ones(3, 21), "attention_mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model(token, attention_mask=wrong, past_key_values=cache)
    if kind == "static":
        hidden = torch.cat([mask, token * 0 + 1], 1).index_fill(1, torch.tensor([19]), 0)
        with pytest.raises(ValueError, match="other tokens of sequence 0 than were stored"):
            model(token, attention_mask=hidden, past_key_values=cache)
    assert int(cache.get_seq_length()) == 20
    if kind == "dynamic":
        hole = torch.cat([mask, torch.tensor([[1, 0, 1], [1, 1, 1]])], 1)
        with pytest.raises(ValueError, match="hole"):
            model(ids[:, :3], attention_mask=hole, past_key_values=cache)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_another_batch_is_refused_before_anything_is_written(kind: str, batch: int) -> None:
    model = flux_ext.patch(tiny("gemma3" if kind == "dynamic" else "llama"), FluxConfig(**SMALL))
    cache = new_cache(model, kind)
    ids, mask = ragged((20, 12, 16))
    model(ids, attention_mask=mask, past_key_values=cache)
    for kwargs in ({}, {"attention_mask": torch.ones(batch, 21)}):
        with pytest.raises(ValueError, match=f"the cache holds 3 sequences, got a batch of {batch}"):
            model(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache, **kwargs)
        assert int(cache.get_seq_length()) == 20
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert int(cache.get_seq_length()) == 21


@pytest.mark.parametrize(("kind", "at"), [("dynamic", 0), ("dynamic", 20), ("static", 0)])
def test_a_forward_that_failed_half_way_is_not_built_on(kind: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, cache = torch.randint(2, 128, (1, 20)), new_cache(model, kind)
    if at:
        model(ids, past_key_values=cache)

    def fail(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(cache.layers[2], "store", fail)
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="an earlier forward failed half-way"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("where", ["first", "sliding"])
@pytest.mark.parametrize("at", [0, 20])
def test_a_layer_that_failed_half_way_is_not_built_on(where: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer of the cache, while it stores; and a layer after a stock one that has stored already."""
    model = flux_ext.patch(tiny("llama" if where == "first" else "gemma3"), FluxConfig(**SMALL))
    ids, cache = torch.randint(2, 128, (1, 20)), new_cache(model, "dynamic")
    if at:
        model(ids, past_key_values=cache)
    first = next(layer for layer in cache.layers if isinstance(layer, FluxCacheLayer))
    assert (first is cache.layers[0]) == (where == "first")

    def fail(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        if where == "first":
            patch.setattr(PagedKeyValues, "append_one" if at else "fill", fail)
        else:
            patch.setattr(first, "store", fail)
        model(ids[:, :1], past_key_values=cache)
    for mask in (None, torch.ones(1, at + 1, dtype=torch.long)):
        with pytest.raises(RuntimeError, match="an earlier forward failed half-way"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    cache.reset()
    close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("copied", [False, True])
def test_a_dropped_cache_gives_its_memory_back_at_once(copied: bool) -> None:
    """Without waiting for the garbage collector, which a GPU that runs out of memory does not start."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, mask = torch.randint(2, 128, (1, 20)), torch.ones(1, 20, dtype=torch.long)
    cache = new_cache(model, "dynamic")
    model(ids, attention_mask=mask, past_key_values=cache)
    if copied:
        cache = copy.deepcopy(cache)
        assert {id(layer) for layer in cache.history.cache_layers} == {id(layer) for layer in cache.layers}
        model(ids[:, :1], attention_mask=torch.ones(1, 21, dtype=torch.long), past_key_values=cache)
    kept = weakref.ref(cache.layers[1].pages)
    gc.disable()
    try:
        del cache
        assert kept() is None
    finally:
        gc.enable()


def test_cropping_an_empty_cache_changes_nothing() -> None:
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids, cache = torch.randint(2, 128, (1, 20)), new_cache(model, "dynamic")
    cache.crop(-3)
    close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


def test_a_mask_of_tokens_alone_is_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that tensors have themselves need no bounds; the answer is that of the mask, or of none."""
    model = flux_ext.patch(tiny("llama"), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (2, 24))
    contexts: list[Any] = []
    read = model_patch.read_forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        contexts.append(read(*args, **kwargs))
        return contexts[-1]

    monkeypatch.setattr(model_patch, "read_forward", spy)
    ones = torch.ones_like(ids)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    contexts.clear()
    assert torch.equal(model.generate(ids, attention_mask=ones, max_new_tokens=4, do_sample=False), plain)
    assert [c.mask is None and c.seq_start is None for c in contexts] == [True] * 4
    contexts.clear()
    padded = ones.clone()
    padded[1, :5] = 0
    model.generate(ids, attention_mask=padded, max_new_tokens=4, do_sample=False)
    assert [c.mask is None for c in contexts] == [False] * 4
