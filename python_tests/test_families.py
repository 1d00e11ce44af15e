"""Every supported family: routed all-full it is the model it was; what cannot be honoured is refused."""

from typing import Any

import pytest
import torch
from models import FAMILIES, MIXED, OTHERS, SMALL, ragged, scramble, tiny

import flux_ext
from flux_ext import FluxConfig
from flux_ext.models.patching import last_routing, policy
from flux_ext.transformers_seam import CACHE, cache_of


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_full_is_the_stock_model(family: str, granularity: str) -> None:
    model = tiny(family)
    ids, mask = ragged()
    generate = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    stock_alone = model(ids[:1]).logits
    stock = model(ids, attention_mask=mask).logits
    stock_tokens = model.generate(ids, **generate)
    flux_ext.patch(model, FluxConfig(granularity=granularity, **SMALL))
    scramble(flux_ext.get_routers(model))
    with flux_ext.routes(model, "full"):
        for use_cache in (False, True):
            torch.testing.assert_close(model(ids[:1], use_cache=use_cache).logits, stock_alone, rtol=1e-4, atol=2e-4)
            routed = model(ids, attention_mask=mask, use_cache=use_cache).logits
            torch.testing.assert_close(routed[mask.bool()], stock[mask.bool()], rtol=1e-4, atol=2e-4)
        assert torch.equal(model.generate(ids, **generate), stock_tokens)
    flux_ext.unpatch(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_decode_from_the_trimmed_cache(family: str) -> None:
    """Step by step from the trimmed cache equals one forward over everything."""
    model = flux_ext.patch(tiny(family), FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (2, 70))
    num_layers = len(flux_ext.get_routers(model).layers)
    routes = torch.randint(0, 2, (2, num_layers, 2), dtype=torch.int32)
    routes[0, 0], routes[1, 0] = 1, 0
    with flux_ext.routes(model, routes):
        whole = model(ids, use_cache=False).logits
        cache = flux_ext.FluxCache(model.config, flux_ext.get_routers(model).config, page_size=4)
        steps = [model(ids[:, :50], past_key_values=cache).logits]
        steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(50, 70)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=2e-4)
    assert torch.equal(cache.routes, routes)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, granularity: str) -> None:
    """All full the stock model, with and without cache; sparse from the trimmed cache what it is without one."""
    model = tiny(family)
    ids, mask = ragged((40, 29))
    stock = model(ids, attention_mask=mask).logits
    flux_ext.patch(model, FluxConfig(granularity=granularity, **SMALL))
    bound = {"rtol": 1e-4, "atol": 1e-3 * float(stock.abs().max())}
    with flux_ext.routes(model, "full"):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], stock[mask.bool()], **bound)
    num_layers = len(flux_ext.get_routers(model).layers)
    with flux_ext.routes(model, torch.arange(num_layers) % 2):
        whole = model(ids[:1], use_cache=False).logits
        first = model(ids[:1, :36])
        cache = cache_of(first)
        steps = [first.logits, *(model(ids[:1, t : t + 1], **{CACHE: cache}).logits for t in range(36, 40))]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **bound)


TAPS = {
    "phi": ("q_proj", "k_proj"),
    "phi, norms": ("q_layernorm", "k_layernorm"),
    "glm": ("q_proj", "k_proj"),
    "glm4": ("q_proj", "k_proj"),
    "gpt_neox": ("query_key_value", "query_key_value"),
    "hunyuan": ("q_proj", "k_proj"),
    "nemotron": ("q_proj", "k_proj"),
    "olmo3": ("q_norm", "k_norm"),
    "persimmon": ("q_layernorm", "k_layernorm"),
    "phi3, partial": ("qkv_proj", "qkv_proj"),
    "yarn": ("q_proj", "k_proj"),
}


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", TAPS)
def test_taps_are_before_the_rotary_embedding(family: str, granularity: str) -> None:
    """Which submodule; and that the same text gives the same logits wherever in the context it stands."""
    model = flux_ext.patch(tiny(family), FluxConfig(granularity=granularity, **SMALL))
    scramble(flux_ext.get_routers(model))
    taps = [x.tap for x in model._flux_ext.attentions if x.tap is not None]
    assert {tap.name for tap in taps} == {TAPS[family][granularity == "head"]}
    assert {tap.norm for tap in taps} == ({f"{taps[0].kind}_layernorm"} if family == "hunyuan" else {None})
    ids, logits = torch.randint(2, 128, (1, 40)), []
    for start in (0, 300):
        model(ids, position_ids=torch.arange(start, start + 40)[None], use_cache=False)
        logits.append(last_routing(model).logits)
    assert logits[0].abs().max() > 1e-3
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_sees_states_before_rotary(family: str, granularity: str) -> None:
    """Logits equal those of a router applied to states computed by hand from the module's own projections."""
    model = flux_ext.patch(tiny(family), FluxConfig(granularity=granularity, **SMALL))
    routers = flux_ext.get_routers(model)
    scramble(routers)
    layer = model.get_decoder().layers[routers.config.routed_layers()[0]]
    attention, inputs = layer.self_attn, []
    handle = attention.register_forward_pre_hook(lambda m, a, k: inputs.append(k["hidden_states"]), with_kwargs=True)
    ids = torch.randint(2, 128, (2, 50))
    model(ids, use_cache=False)
    handle.remove()
    heads = 4 if granularity == "layer" else 2
    letter = "q" if granularity == "layer" else "k"
    if family == "phi3":
        parts = attention.qkv_proj(inputs[0]).split([64, 32, 32], -1)
        states = parts[0 if granularity == "layer" else 1].unflatten(-1, (heads, 16))
    else:
        flat = getattr(attention, f"{letter}_proj")(inputs[0])
        norm = getattr(attention, f"{letter}_norm", None)
        if norm is not None and norm.weight.shape[0] == flat.shape[-1]:  # OLMo 2 norms all heads at once
            flat, norm = norm(flat), None
        states = flat.unflatten(-1, (heads, 16))
        states = states if norm is None else norm(states)
    want = routers.layers[0](states)
    torch.testing.assert_close(last_routing(model).logits[:, 0], want, rtol=1e-4, atol=1e-5)


def test_only_full_attention_layers_are_routed() -> None:
    model = flux_ext.patch(tiny("gemma3"), FluxConfig(**SMALL))
    routers = flux_ext.get_routers(model)
    assert routers.config.layers_to_route == [1, 3] and len(routers.layers) == 2
    cache = model(torch.randint(2, 128, (1, 30))).past_key_values
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "FluxCacheLayer"] * 2
    assert cache.routes.shape == (1, 2, 2)


def test_layers_to_route_leaves_the_others_full() -> None:
    model = tiny("llama")
    ids = torch.randint(2, 128, (2, 60))
    flux_ext.patch(model, FluxConfig(**SMALL))
    with flux_ext.routes(model, torch.tensor([0, 1, 0, 1])):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
    flux_ext.unpatch(model)
    flux_ext.patch(model, FluxConfig(layers_to_route=[1, 3], **SMALL))
    with flux_ext.routes(model, "sparse"):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert out.past_key_values.routes.shape == (2, 2, 2)


REFUSED = {
    "soft-capping": ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "only sliding": ("mistral", {"sliding_window": 8}, "full attention"),
    "bidirectional": ("gemma3", {"use_bidirectional_attention": True}, "both directions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    family, changes, message = REFUSED[case]
    model = tiny(family, **changes)
    with pytest.raises(ValueError, match=message):
        flux_ext.patch(model)
    assert not flux_ext.is_patched(model) and model.config._attn_implementation == "eager"


def other_models() -> dict[str, tuple[Any, str]]:
    import transformers as t

    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mla = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    moe = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16)
    return {
        "T5": (
            lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        "DeepSeek": (
            lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**small, **heads, **mla, **moe)),
            "multi-head latent attention",
        ),
        "gpt-oss": (
            lambda: t.GptOssForCausalLM(
                t.GptOssConfig(**small, **heads, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
            ),
            "sinks",
        ),
        "GPT-2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)), "GPT2"),
    }


@pytest.mark.parametrize("name", ["T5", "DeepSeek", "gpt-oss", "GPT-2"])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    make, message = other_models()[name]
    model = make()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        flux_ext.patch(model)
    assert not flux_ext.is_patched(model) and set(model.state_dict()) == before


def test_attention_dropout_in_training_is_refused() -> None:
    model = flux_ext.patch(tiny("llama", attention_dropout=0.1), FluxConfig(**SMALL)).train()
    with pytest.raises(ValueError, match="dropout"):
        model(torch.randint(2, 128, (1, 20)))
    model.eval()(torch.randint(2, 128, (1, 20)))


def test_a_wrong_tap_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose norm acts after the projection, tapped at the projection, must not pass."""
    from flux_ext.models import families

    monkeypatch.setattr(families, "NORMS", {"query": (), "key": ()})
    model = tiny("qwen3")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.mul_(2)
    with pytest.raises(ValueError, match=r"no submodule gives its query states before a rotary embedding.*q_proj"):
        flux_ext.patch(model)
    assert not flux_ext.is_patched(model)
    assert not any("flux" in name for name in model.state_dict()) and model.config._attn_implementation == "eager"


def test_mixed_layers_with_padding_and_cache_match_a_policy_per_call() -> None:
    """Layers with a window of their own and routed ones, ragged, decode step by step."""
    model = flux_ext.patch(tiny("gemma3", layer_types=MIXED), FluxConfig(**SMALL))
    ids, mask = ragged((40, 29), "left")
    seen: list[int] = []

    def sparse(layer: int, logits: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        return torch.ones(len(logits), dtype=torch.int32)

    with policy(model, sparse):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        assert seen == [0, 1]  # once per routed layer, at the prompt
        for b, length in enumerate((40, 29)):
            alone = model.generate(ids[b : b + 1, -length:], max_new_tokens=10, do_sample=False)
            assert torch.equal(alone[0, length:], out[b, 40:])
