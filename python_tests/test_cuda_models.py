"""Patched models on a GPU: the same answers as on the CPU, and no waiting for the device where none is promised."""

import pytest
import torch
from models import SMALL, tiny

import flux_ext
from flux_ext.caches.static import FluxStaticCache
from flux_ext.models import prompt_lengths

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIXED = torch.tensor([0, 1, 1, 0], dtype=torch.int32)


def model_on_gpu(dtype=torch.bfloat16):
    return tiny("llama").to("cuda", dtype)


def routes_of(model):
    return MIXED[: len(flux_ext.get_routers(model).layers)]


def prompts():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (3, 40), generator=g)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2, :30] = 0
    return ids.cuda(), mask.cuda()


@torch.no_grad()
def test_all_full_is_the_stock_model():
    ids, mask = prompts()
    model = model_on_gpu()
    stock = model(ids, attention_mask=mask).logits
    with flux_ext.patched(model, flux_ext.FluxConfig(**SMALL)), flux_ext.routes(model, "full"):
        got = model(ids, attention_mask=mask).logits
    real = mask.bool()
    error = (got - stock)[real].float().norm() / stock[real].float().norm()
    assert error < 2e-2, error


@torch.no_grad()
def test_mixed_routes_are_those_of_the_cpu():
    ids, mask = prompts()
    gpu = flux_ext.patch(model_on_gpu(), flux_ext.FluxConfig(**SMALL))
    cpu = flux_ext.patch(tiny("llama").to(torch.bfloat16).float(), flux_ext.FluxConfig(**SMALL))
    with flux_ext.routes(gpu, routes_of(gpu)), flux_ext.routes(cpu, routes_of(cpu)):
        got = gpu(ids, attention_mask=mask).logits.float().cpu()
        want = cpu(ids.cpu(), attention_mask=mask.cpu()).logits
    real = mask.cpu().bool()
    error = (got - want)[real].norm() / want[real].norm()
    assert error < 3e-2, error


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_is_one_forward_over_everything(cache):
    """Greedy tokens, generated from the trimmed cache, are what the untrimmed pattern would choose (up to rounding)."""
    ids, _ = prompts()
    model = flux_ext.patch(model_on_gpu(), flux_ext.FluxConfig(**SMALL))
    with flux_ext.routes(model, routes_of(model)):
        kwargs = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        out = model.generate(ids[:1], max_new_tokens=40, do_sample=False, eos_token_id=None, **kwargs)
        logits = model(out, use_cache=False).logits[:, 39:-1].float()
    chosen = logits.gather(-1, out[:, 40:, None])[..., 0]
    gap = logits.max(-1).values - chosen
    assert (gap <= 3e-2 * logits.abs().max()).all(), gap.max()


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("preset", ["fa-ssa", "fa-ta", "fa-xa", "xa-ssa"])
def test_every_mode_decodes_as_one_forward_over_everything(preset, cache):
    """Greedy tokens behind a prompt of several blocks, of which most are left out, are those that a forward over prompt
    and answer would choose (up to rounding)."""
    model = tiny("llama", max_position_embeddings=1024).to("cuda", torch.bfloat16)
    numbers = {"sink": 4, "window": 24, "last_q": 9, "threshold": 0.5, "block_width": 64, "pool_size": 20}
    flux_ext.patch(model, flux_ext.FluxConfig.preset(preset, **numbers))
    ids = torch.randint(3, 100, (1, 500), generator=torch.Generator().manual_seed(0)).cuda()
    with flux_ext.routes(model, routes_of(model)):
        options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, **options)
        with prompt_lengths(model, torch.tensor([500])):
            logits = model(out, use_cache=False).logits[:, 499:-1].float()
    gap = logits.max(-1).values - logits.gather(-1, out[:, 500:, None])[..., 0]
    assert (gap <= 5e-2 * logits.abs().max()).all(), gap.max()


@torch.no_grad()
def test_a_static_decode_step_never_waits_and_replays_in_a_graph():
    ids, _ = prompts()
    model = flux_ext.patch(model_on_gpu(), flux_ext.FluxConfig(**SMALL))
    config = flux_ext.get_routers(model).config
    steps = torch.randint(3, 100, (20, 1, 1), device="cuda")

    def fresh_cache():
        cache = FluxStaticCache(model.config, config, max_cache_len=128)
        model(ids[:1], past_key_values=cache)
        return cache

    with flux_ext.routes(model, routes_of(model)):
        cache = fresh_cache()
        position = torch.full((1, 1), 40, device="cuda")
        eager = []
        for i, token in enumerate(steps):
            if i == 2:  # after the first steps have set up what is made once
                torch.cuda.set_sync_debug_mode("error")
            try:
                eager.append(model(token, past_key_values=cache, position_ids=position).logits.clone())
            finally:
                torch.cuda.set_sync_debug_mode("default")
            position += 1

        cache = fresh_cache()
        token, position = steps[0].clone(), torch.full((1, 1), 40, device="cuda")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(2):
                token.copy_(steps[i])
                model(token, past_key_values=cache, position_ids=position)
                position += 1
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache, position_ids=position).logits
        for i in range(2, len(steps)):
            token.copy_(steps[i])
            graph.replay()
            position += 1
            assert torch.equal(logits, eager[i]), f"step {i}"
