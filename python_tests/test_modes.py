"""Every full and sparse mode in a patched model, against masks over the whole sequence (``masked_twin``)."""

import dataclasses
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from cases import THIRD
from masked_twin import MaskedTwin
from models import ragged, tiny
from torch import Tensor

import flux_ext
from flux_ext import FluxCache, FluxConfig, FluxStaticCache
from flux_ext.models import patching
from flux_ext.transformers_seam import CACHE, cache_of

NUMBERS: dict[str, Any] = {"sink": 4, "window": 24, "last_q": 9, "threshold": 0.6, "block_width": 64, "pool_size": 20}
"""A pattern that hides most of the tests' prompts, and block lists that leave out many blocks."""
LENGTHS = (310, 297, 150)
ROUTES = torch.tensor(
    [[[0, 1], [1, 0], [1, 1], [0, 0]], [[1, 1], [0, 0], [1, 0], [1, 1]], [[0, 1], [1, 1], [0, 0], [1, 0]]]
)
"""``[B, L, Hkv]``: heads of one layer and sequences of one batch differ."""
MODES: dict[str, FluxConfig] = {
    **{name: FluxConfig.preset(name, **NUMBERS) for name in ("fa-ssa", "fa-ta", "fa-xa", "xa-ssa")},
    "fa-ssa, dense decode": FluxConfig.preset("fa-ssa", decode="dense", **NUMBERS),
    "fa-ta, dense decode": FluxConfig.preset("fa-ta", decode="dense", **NUMBERS),
    "fa-xa, sparse decode": FluxConfig.preset("fa-xa", decode="sparse", **NUMBERS),
    "xa-ta": FluxConfig(full="block_sparse", pattern="triangle", **NUMBERS),
    "xa-xa, aligned": FluxConfig(full="block_sparse", pattern="block_sparse", **{**NUMBERS, "align": 8}),
    "fa-own": FluxConfig(pattern=THIRD.name, **NUMBERS),
    "fa-own, dense decode": FluxConfig(pattern=THIRD.name, decode="dense", **NUMBERS),
    "own-ssa": FluxConfig(full=THIRD.name, **NUMBERS),
    "fa-xa, 128 wide, stride 8": FluxConfig.preset("fa-xa", **{**NUMBERS, "block_width": 128, "stride": 8}),
}  # fmt: skip
every_mode = pytest.mark.parametrize("mode", MODES)
some_modes = pytest.mark.parametrize("mode", ["fa-ta", "fa-xa", "xa-ta", "fa-ssa, dense decode", "fa-own"])
chunked_modes = pytest.mark.parametrize("mode", [name for name in MODES if MODES[name].pattern != "triangle"])


def stock() -> Any:
    return tiny("llama", max_position_embeddings=1024)


def prompts(side: str = "left") -> tuple[Tensor, Tensor, list[list[int]]]:
    """Token ids and mask of a padded batch, and each prompt alone."""
    torch.manual_seed(3)
    ids, mask = ragged(LENGTHS, side)
    return ids, mask, [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


@every_mode
def test_generate(mode: str) -> None:
    """A padded batch of mixed routes over both caches and over none: the twin's tokens, and its logits of prompts."""
    config, count = MODES[mode], 12
    ids, mask, alone = prompts()
    twins = [MaskedTwin(stock(), config, route) for route in ROUTES]
    model = flux_ext.patch(stock(), config)
    with torch.no_grad(), flux_ext.routes(model, ROUTES):
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, twin, prompt in zip(logits, twins, alone, strict=True):
            want = twin.logits(prompt, len(prompt))
            torch.testing.assert_close(row[-len(prompt) :], want, atol=2e-3, rtol=1e-3)
        outputs = []
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
            options |= {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True}
            outputs.append(model.generate(ids, attention_mask=mask, **options).sequences[:, ids.shape[1] :])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for twin, prompt, new in zip(twins, alone, outputs[0].tolist(), strict=True):
        assert twin.continues(prompt + new[:-1], len(prompt)) == new


@chunked_modes
@pytest.mark.parametrize("chunk", [100, 128])
def test_a_prompt_in_chunks(mode: str, chunk: int) -> None:
    """Chunks choose their blocks over the keys in the cache, of which none may be missing."""

    config = dataclasses.replace(MODES[mode], route_on="first_chunk")
    alone = prompts()[2][0]
    model = flux_ext.patch(stock(), config)
    with flux_ext.routes(model, ROUTES[:1]):
        out = model.generate(
            torch.tensor([alone]),
            max_new_tokens=8,
            do_sample=False,
            prefill_chunk_size=chunk,
            return_dict_in_generate=True,
        )
    new = out.sequences[0, len(alone) :].tolist()
    assert MaskedTwin(stock(), config, ROUTES[0], chunk).continues(alone + new[:-1], len(alone)) == new
    kept = out.past_key_values.layers[0].stored_tokens()[0]
    assert kept[0] == len(alone) + 7 and (kept[1] < 200) == (
        config.decode == "sparse" and config.pattern == "streaming"
    )
    if chunk == 128 and config.decode == "dense":  # whole blocks of queries: the same as all at once
        whole = flux_ext.patch(stock(), MODES[mode])
        with flux_ext.routes(whole, ROUTES[:1]):
            same = whole.generate(torch.tensor([alone]), max_new_tokens=8, do_sample=False)
        assert torch.equal(same, out.sequences)


@every_mode
@pytest.mark.parametrize("static", [False, True])
def test_memory(mode: str, static: bool) -> None:
    """What sparse decoding does not show is given back, right after the prompt; dense decoding keeps everything."""
    config = MODES[mode]
    ids, mask, _ = prompts()
    model = flux_ext.patch(stock(), config)
    cache: Any = (
        FluxStaticCache(model.config, config, 320, page_size=8) if static else FluxCache(model.config, config, 8)
    )
    with torch.no_grad(), flux_ext.routes(model, ROUTES):
        model(ids, attention_mask=mask, **{CACHE: cache})
    most = -(-config.sink // 8) * 8 + config.window + 8 + 2 * config.align
    room = cache.layers[0].layout
    pages = 0
    for layer, routes in zip(cache.layers, ROUTES.unbind(1), strict=True):
        for b, h in ((b, h) for b in range(3) for h in range(2)):
            stored = layer.stored_tokens()[b, h]
            if routes[b, h] and config.decode == "sparse":
                assert stored <= most
                pages += room.sink_pages + room.ring_pages() if static else -(-int(stored) // 8)
            else:
                assert stored == LENGTHS[b]
                pages += -(-320 // 8) if static else -(-LENGTHS[b] // 8)
    head_dim, fp32 = 16, 4
    if static:
        assert cache.nbytes() == pages * 8 * head_dim * fp32 * 2
    else:  # a few pages may be free, for the tokens to come
        assert pages <= cache.nbytes() / (8 * head_dim * fp32 * 2) <= 1.2 * pages


@some_modes
def test_beam_search(mode: str) -> None:
    """Sequences of a cache are repeated and reordered; without a cache nothing is."""
    model = flux_ext.patch(stock(), MODES[mode])
    ids, mask = (x[1:] for x in prompts()[:2])
    with flux_ext.routes(model, ROUTES[0].expand(4, 4, 2)):
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@some_modes
def test_assisted_decoding(mode: str) -> None:
    """The first forward has candidates behind the prompt: its last rows and its blocks are the prompt's own."""
    model = flux_ext.patch(stock(), MODES[mode])
    prompt = torch.randint(2, 20, (1, 12)).repeat(1, 20)  # repeats itself, so that lookups hit
    with flux_ext.routes(model, ROUTES[:1]):
        want = model.generate(prompt, max_new_tokens=16, do_sample=False)
        got = model.generate(prompt, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=8)
    assert torch.equal(got, want)


@every_mode
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_prompt_and_answer_in_one_forward(mode: str, layout: str) -> None:
    """As in training: the logits of the answers are those of decoding step by step."""
    config, answers = MODES[mode], [7, 12, 3]
    ids, mask, alone = prompts("right" if layout == "right" else "left")
    lengths = torch.tensor([len(x) - n for x, n in zip(alone, answers, strict=True)])
    model = flux_ext.patch(stock(), config)
    with torch.no_grad(), flux_ext.routes(model, ROUTES), patching.prompt_lengths(model, lengths):
        if layout == "packed":
            bounds = torch.tensor([0, *map(len, alone)]).cumsum(0).int()
            positions = torch.cat([torch.arange(len(x)) for x in alone])[None]
            out = model(torch.tensor([[*chain(*alone)]]), position_ids=positions, cu_seq_lens_q=bounds, use_cache=False)
            found = [out.logits[0, a:b] for a, b in pairwise(bounds)]
        else:
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
            found = [row[kept.bool()] for row, kept in zip(out.logits, mask, strict=True)]
    for b, got in enumerate(found):
        want = MaskedTwin(stock(), config, ROUTES[b]).logits(alone[b], int(lengths[b]))
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


@every_mode
def test_fractional_routes(mode: str) -> None:
    """Both modes mixed, in the prompt and in the answer, as soft training has them."""
    config = MODES[mode]
    alone = prompts()[2][1]
    weights = torch.rand(4, 2)
    model = flux_ext.patch(stock(), config)
    with torch.no_grad(), flux_ext.routes(model, weights[None]), patching.prompt_lengths(model, torch.tensor([280])):
        got = model(torch.tensor([alone]), use_cache=False).logits[0]
    want = MaskedTwin(stock(), config, weights).logits(alone, 280)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("mode", ["xa-ssa", "xa-xa, aligned", "own-ssa"])
def test_dense_whatever_the_full_mode_is(mode: str, chunks: bool) -> None:
    """Within the block the model is what it was unpatched, over either cache and over none; chunks of a prompt too."""
    config = dataclasses.replace(MODES[mode], route_on="first_chunk" if chunks else "prompt")
    ids, mask, _ = prompts()
    model, want = flux_ext.patch(stock(), config), stock()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    tokens = want.generate(ids, **options)
    with patching.dense(model):
        for more in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(model.generate(ids, **options, **more), tokens), more
        first = model(ids[:, :200], attention_mask=mask[:, :200], use_cache=True)
        if chunks:
            rest = model(ids[:, 200:], attention_mask=mask, **{CACHE: cache_of(first)}).logits
            torch.testing.assert_close(rest, want(ids, attention_mask=mask).logits[:, 200:], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="the cache was made for other settings than this model's .full: "):
        model(ids[:, 200:], attention_mask=mask, **{CACHE: cache_of(first)})
    with flux_ext.routes(model, "full"):
        blocks = model(ids, attention_mask=mask, use_cache=False).logits
    assert not torch.allclose(blocks[:, -1], want(ids, attention_mask=mask).logits[:, -1], atol=1e-2)


def test_what_was_dense_is_recomputed_so() -> None:
    """Checkpointed layers run again in the backward pass, which may come after the block, or in another thread."""
    ids, mask, _ = prompts()
    model, want = flux_ext.patch(stock(), MODES["xa-ssa"]), stock()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(x: Any) -> Tensor:
        return x(ids, attention_mask=mask, use_cache=False).logits[:, -1].square().mean()

    with patching.dense(model):
        dense = loss(model)
    dense.backward()
    loss(want).backward()
    for got, other in zip(model.model.layers, want.model.layers, strict=True):
        torch.testing.assert_close(got.self_attn.q_proj.weight.grad, other.self_attn.q_proj.weight.grad)
