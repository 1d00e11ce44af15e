"""What a patched model shares with others: its configuration, as an object, a copy or a file, and its routers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import BASE, SMALL, scramble, tiny
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flux_ext
from flux_ext import FluxConfig, get_routers
from flux_ext.models import families

IDS = torch.randint(2, 128, (2, 50), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def stock_config(implementation: str = "sdpa") -> LlamaConfig:
    config = LlamaConfig(**BASE)
    config._attn_implementation = implementation
    return config


def make(config: LlamaConfig, seed: int = 0) -> Any:
    """A model of this very configuration object."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    assert model.config is config
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return model


def patch(model: Any) -> Any:
    flux_ext.patch(model, FluxConfig(**SMALL))
    scramble(get_routers(model))
    return model


def test_the_other_model_of_a_configuration_stays_as_it_is() -> None:
    config = stock_config()
    a, b = make(config), make(config, 1)
    want = b(IDS).logits
    implementation = []
    interface = transformers.AttentionInterface()
    sdpa = interface["sdpa"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        implementation.append("sdpa")
        return sdpa(*args, **kwargs)

    transformers.AttentionInterface.register("sdpa", counted)
    try:
        patch(a)
        implementation.clear()
        assert config._attn_implementation == "sdpa"
        assert torch.equal(b(IDS).logits, want) and len(implementation) == 4
        with flux_ext.routes(a, "full"):
            full = a(IDS).logits
        assert len(implementation) == 4
        torch.testing.assert_close(full, make(config)(IDS).logits, rtol=1e-4, atol=2e-4)
        # The other one may change its own implementation, be patched and unpatched.
        b.set_attn_implementation("eager")
        want = a.generate(IDS, **GREEDY)
        patch(b)
        b.generate(IDS, **GREEDY)
        flux_ext.unpatch(b)
        assert torch.equal(a.generate(IDS, **GREEDY), want)
        flux_ext.unpatch(a)
        assert a.model.config is config and all(x.self_attn.config is config for x in a.model.layers)
    finally:
        transformers.AttentionInterface.register("sdpa", sdpa)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["the object", "deepcopy", "pickle", "dictionary", "file"])
def test_models_made_of_a_patched_models_configuration(tmp_path: Path, how: str, implementation: str) -> None:
    stock = make(stock_config(implementation))
    want = stock(IDS).logits
    stock.save_pretrained(tmp_path)
    patched = patch(stock)
    config = patched.config
    if how == "deepcopy":
        config = copy.deepcopy(config)
    elif how == "pickle":
        config = pickle.loads(pickle.dumps(config))
    elif how == "dictionary":
        assert "flux" not in str(config.to_dict())
        config = LlamaConfig.from_dict(config.to_dict())
    elif how == "file":
        config.save_pretrained(tmp_path / "config")
        assert "flux" not in (tmp_path / "config" / "config.json").read_text()
        config = LlamaConfig.from_pretrained(tmp_path / "config")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=2e-4)
    made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(made.eval()(IDS).logits, want, rtol=1e-4, atol=2e-4)
    AutoModel.from_config(config)(IDS)
    for other in (loaded, made):
        assert not flux_ext.is_patched(other) and other.config._attn_implementation in ("sdpa", "eager")
    patched.generate(IDS, **GREEDY)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_shares_its_configuration_with_itself_alone(how: str) -> None:
    model = patch(make(stock_config()))
    want = model.generate(IDS, **GREEDY)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other.generate(IDS, **GREEDY), want)
    for x, y in ((model, other), (other, model)):
        x.config.output_hidden_states = True
        assert x(IDS).hidden_states is not None and y(IDS).hidden_states is None
        x.config.output_hidden_states = False
    assert other.config._attn_implementation == "sdpa"
    flux_ext.unpatch(other)
    assert other.model.config is other.config
    other(IDS)
    assert torch.equal(model.generate(IDS, **GREEDY), want)


def test_later_changes_of_the_configuration_count() -> None:
    """As in a stock model, whose parts all have the one configuration."""
    model = patch(make(stock_config()))
    assert model(IDS).past_key_values is not None
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.model.config.use_cache = True
    assert model.config.use_cache and model(IDS).past_key_values is not None


@pytest.mark.parametrize(
    "target_is, assistant_is", [("patched", "stock"), ("stock", "patched"), ("patched", "patched")]
)
@pytest.mark.parametrize("shared", [True, False])
def test_assisted_decoding(target_is: str, assistant_is: str, shared: bool) -> None:
    config = stock_config()
    target, assistant = make(config), make(config if shared else stock_config("eager"))
    with torch.no_grad():  # near enough that some candidates are taken
        for p in assistant.parameters():
            p.add_(0.02 * torch.randn_like(p))
    for model, state in ((target, target_is), (assistant, assistant_is)):
        if state == "patched":
            patch(model)
    prompt = IDS[:1]
    want = target.generate(prompt, max_new_tokens=10, do_sample=False)
    alone = assistant.generate(prompt, max_new_tokens=10, do_sample=False)
    assert torch.equal(target.generate(prompt, assistant_model=assistant, max_new_tokens=10, do_sample=False), want)
    assert torch.equal(assistant.generate(prompt, max_new_tokens=10, do_sample=False), alone)


def vision_language() -> Any:
    text = transformers.Gemma3TextConfig(**BASE, layer_types=["full_attention"] * 4)
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_a_model_of_several_parts() -> None:
    """Its masks are made from the whole configuration, by the model and by generate."""
    model = vision_language()
    ids = torch.randint(2, 100, (2, 40))
    want, tokens = model(ids).logits, model.generate(ids, **GREEDY)
    flux_ext.patch(model, FluxConfig(**SMALL))
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    with flux_ext.routes(model, "full"):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=2e-4)
        assert torch.equal(model.generate(ids, **GREEDY), tokens)
        assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY), tokens)
        other = copy.deepcopy(model)
    with flux_ext.routes(other, "full"):
        torch.testing.assert_close(other(ids).logits, want, rtol=1e-4, atol=2e-4)
    made = transformers.AutoModelForImageTextToText.from_config(model.config)
    made.load_state_dict(flux_ext.unpatch(model).state_dict())
    torch.testing.assert_close(made.eval()(ids).logits, want, rtol=1e-4, atol=2e-4)


# --- One FluxRouters in several models


def test_routers_of_two_models_on_one_device() -> None:
    a = patch(tiny())
    routers = get_routers(a)
    want = a.generate(IDS, **GREEDY)
    b = flux_ext.patch(tiny().to(torch.bfloat16), routers=routers)
    b.generate(IDS, **GREEDY)
    assert get_routers(b) is routers and torch.equal(a.generate(IDS, **GREEDY), want)
    flux_ext.unpatch(b)
    assert torch.equal(a.generate(IDS, **GREEDY), want)


def test_routers_are_not_taken_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere: list[Any] = []
    device_of = families.device_of

    def device(module: Any, model: Any = None) -> torch.device:
        return torch.device("meta") if model in elsewhere else device_of(module, model)

    monkeypatch.setattr(families, "device_of", device)
    a, b = patch(tiny()), tiny()
    elsewhere.append(b)
    routers = get_routers(a)
    want: Tensor = a.generate(IDS, **GREEDY)
    copied = copy.deepcopy(a)
    for model, those in ((a, routers), (copied, get_routers(copied))):
        with pytest.raises(ValueError, match=r"part of another patched model, on cpu, and this one is on meta"):
            flux_ext.patch(b, routers=those)
        assert not flux_ext.is_patched(b) and torch.equal(model.generate(IDS, **GREEDY), want)
    # Routers that no model uses any more may move.
    del a, copied, model, those
    with pytest.raises(ValueError, match="must be on the device of x"):  # nothing else of the model is there
        flux_ext.patch(b, routers=routers)
    assert all(p.is_meta for p in routers.parameters())


def test_a_shallow_copy_of_what_a_module_sees_is_apart() -> None:
    """As transformers makes one per layer of a model whose layers differ, and takes settings out of it."""
    config = stock_config()
    model = patch(make(config))
    seen = model.model.layers[0].self_attn.config
    own = copy.copy(seen)
    del own.__dict__["intermediate_size"]
    own.hidden_size = 7
    assert config.hidden_size == model.config.hidden_size == seen.hidden_size != 7
    assert own._attn_implementation == seen._attn_implementation and config.intermediate_size
