"""The static cache under a captured CUDA graph: masks, reset and the end of the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import SMALL, tiny
from torch import Tensor
from transformers.generation import CompileConfig

import flux_ext
from flux_ext import FluxCache, FluxStaticCache
from flux_ext.caches.host_copy import HostCopy
from flux_ext.models.patching import get_routers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUTES = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.int32)
LENGTH = 96


def patched() -> Any:
    return flux_ext.patch(tiny("llama").to("cuda", torch.bfloat16), flux_ext.FluxConfig(**SMALL))


def new_cache(model: Any, **kwargs: Any) -> FluxStaticCache:
    return FluxStaticCache(model.config, get_routers(model).config, LENGTH, page_size=16, **kwargs)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 100, shape).cuda()


class Step:
    """A decode step of two sequences as a CUDA graph, with its inputs at fixed addresses."""

    def __init__(self, model: Any, cache: FluxStaticCache, mask: Tensor | None) -> None:
        self.token, self.position = tokens(2, 1), torch.zeros(2, 1, dtype=torch.long, device="cuda")
        self.mask = mask

        def run() -> Tensor:
            return model(self.token, position_ids=self.position, attention_mask=self.mask, past_key_values=cache).logits

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run()

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits[:, 0].clone()


def agree(got: Tensor, want: Tensor) -> None:
    """Logits of two caches in bf16: their attention differs by rounding."""
    error = (got - want).float().norm() / want.float().norm()
    assert error < 3e-2, error


def without_waiting(run: Callable[[], Any]) -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_masked_tokens_in_a_captured_step() -> None:
    """The graph reads the mask where it was: a step's column says which sequences have a token."""
    model = patched()
    ids, valid = tokens(2, 70), torch.rand(2, 70) < 0.6
    valid[:, :30] = True
    mask = torch.zeros(2, LENGTH, dtype=torch.long, device="cuda")
    mask[:, :30] = 1
    with flux_ext.routes(model, ROUTES):
        cache, dynamic = new_cache(model), FluxCache(model.config, get_routers(model).config)
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=dynamic)
        for t in range(30, 34):  # an eager step waits for nothing either
            mask[:, t] = valid[:, t].cuda()
            position = (mask.cumsum(1) - 1)[:, t : t + 1]
            run = {"position_ids": position, "past_key_values": cache, "attention_mask": mask}
            step = ids[:, t : t + 1]
            got = without_waiting(lambda: model(step, **run)) if t > 31 else model(step, **run)  # noqa: B023
            want = model(step, **{**run, "past_key_values": dynamic, "attention_mask": mask[:, : t + 1]})
            for b in valid[:, t].nonzero()[:, 0]:
                agree(got.logits[b], want.logits[b])
        seen = [layer.seen.clone() for layer in cache.layers]
        state = {id(layer): [t.clone() for t in changed(layer)] for layer in cache.layers}
        step = Step(model, cache, mask)
        for layer in cache.layers:  # as before the capture
            for t, before in zip(changed(layer), state[id(layer)], strict=True):
                t.copy_(before)
        assert all(torch.equal(layer.seen, before) for layer, before in zip(cache.layers, seen, strict=True))
        for t in range(34, 70):
            mask[:, t] = valid[:, t].cuda()
            position = (mask.cumsum(1) - 1)[:, t : t + 1]
            got = step(ids[:, t : t + 1], position)
            want = model(
                ids[:, t : t + 1], position_ids=position, attention_mask=mask[:, : t + 1], past_key_values=dynamic
            ).logits[:, 0]
            for b in valid[:, t].nonzero()[:, 0]:
                agree(got[b], want[b])
    assert torch.equal(cache.layers[3].seen[:, 0].cpu().long(), valid.sum(1))


def changed(layer: Any) -> tuple[Tensor, ...]:
    return layer.seen, layer.slots, layer.kv_len, layer.table, layer.k_pool, layer.v_pool


@torch.no_grad()
@pytest.mark.parametrize("any_routes", [False, True])
def test_a_captured_step_goes_on_after_reset(any_routes: bool) -> None:
    """With the next prompt, its length and its routes; and what was freed in between is not written to."""
    model = patched()
    cache = new_cache(model, any_routes=any_routes)
    with flux_ext.routes(model, ROUTES):
        model(tokens(2, 40), past_key_values=cache)
        step = Step(model, cache, None)
    for length, routes in ((23, ROUTES), (61, ROUTES * 0 if any_routes else ROUTES.flip(0))):
        cache.reset()
        guard = [torch.zeros(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(8)]  # takes what is free
        ids = tokens(2, length + 20)
        with flux_ext.routes(model, routes):
            model(ids[:, :length], past_key_values=cache)
            for t in range(length, length + 20):
                got = step(ids[:, t : t + 1], torch.full((2, 1), t))
            agree(got, model(ids, use_cache=False).logits[:, -1])
        assert torch.equal(cache.routes[:, :, 0].cpu(), routes)
        assert not any(bool(g.any()) for g in guard)


@torch.no_grad()
def test_beyond_the_end_there_is_no_text() -> None:
    """NaN for the sequence that is full, and for it alone: the other one has padding before it, and room left."""
    model = patched()
    ids, mask = tokens(2, LENGTH + 8), torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    mask[1, :20] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start = new_cache(model), LENGTH - 2
    with flux_ext.routes(model, ROUTES):
        model(ids[:, :start], attention_mask=mask[:, :start], position_ids=position[:, :start], past_key_values=cache)
        for t in range(start, LENGTH + 8):
            at = position[:, -1:] + (t - LENGTH + 1)
            got = model(ids[:, t : t + 1], position_ids=at, past_key_values=cache).logits[:, 0]
            assert got[0].isnan().all() == (t >= LENGTH) and not got[1].isnan().any()
    with flux_ext.routes(model, ROUTES[1:]):
        agree(got[1], model(ids[1:, 20:], use_cache=False).logits[0, -1])


@torch.no_grad()
def test_a_mask_that_contradicts_the_cache_gives_no_text() -> None:
    model = patched()
    ids, mask = tokens(2, 40), torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    mask[1, :7] = 0
    with flux_ext.routes(model, ROUTES):
        for wrong in (None, (0, 12), (1, 3)):  # as fed; a token is hidden; padding is shown
            cache, shown = new_cache(model), mask.clone()
            model(ids, attention_mask=mask[:, :40], past_key_values=cache)
            if wrong is not None:
                shown[wrong] ^= 1
            logits = model(ids[:, :1], attention_mask=shown, past_key_values=cache).logits
            for b in range(2):
                assert logits[b].isnan().all() == (wrong is not None and wrong[0] == b)


@torch.no_grad()
def test_generate_with_a_compiled_static_cache_in_a_padded_batch() -> None:
    model = patched()
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long, device="cuda")
    mask[1, :13] = 0
    kwargs: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with flux_ext.routes(model, ROUTES):
        config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        out = model.generate(ids, cache_implementation="static", compile_config=config, **kwargs)
        for b in range(2):
            with flux_ext.routes(model, ROUTES[b : b + 1]):
                alone = out[b : b + 1, 13 * b :]
                logits = model(alone, use_cache=False).logits[:, -13:-1].float()
                chosen = logits.gather(-1, alone[:, -12:, None])[..., 0]
                assert (logits.max(-1).values - chosen <= 3e-2 * logits.abs().max()).all()


def test_a_copy_to_the_host_is_not_waited_for_longer_than_it_takes() -> None:
    """Not for what was launched after it, as a prompt's attention is after the copy of its route."""
    x = torch.arange(6, dtype=torch.int32, device="cuda").view(2, 3)
    for route in (x, x[:, :1].expand(-1, 3)):
        HostCopy(route).wait()  # the first one takes pinned memory
        copy = HostCopy(route)
        torch.cuda._sleep(1_000_000_000)
        later = torch.cuda.current_stream().record_event()
        values = copy.wait()
        assert not later.query()
        assert values.tolist() == route.tolist()
