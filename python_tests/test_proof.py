"""patch tries the model at hand: whole kinds of attention that it cannot honour are refused, and nothing is changed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SMALL, tiny
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, chunked_overlay, or_masks, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

import flux_ext
from flux_ext import FluxConfig
from flux_ext.models import attention_function, proof
from flux_ext.models.patching import last_routing
from flux_ext.transformers_seam import CACHE, cache_of


class Odd(nn.Module):
    """Llama's attention, around the same weights, with something of its own."""

    def __init__(self, stock: nn.Module, oddity: str) -> None:
        super().__init__()
        self.oddity, self.config, self.layer_idx = oddity, stock.config, stock.layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj
        self.head_dim, self.num_key_value_groups = stock.head_dim, stock.num_key_value_groups
        self.scaling, self.is_causal, self.attention_dropout = stock.scaling, True, 0.0

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        cache = kwargs.pop(CACHE, None)
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(split).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        how = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, llama.eager_attention_forward)
        extra: dict[str, Any] = {}
        if self.oddity == "changes values after the cache":
            v = v * (1 + torch.arange(v.shape[2]) / 8)[:, None]
        if self.oddity == "reads more of the cache":
            v = v + k.mean(2, keepdim=True)
        if self.oddity == "bias by keyword":
            extra["position_bias"] = torch.zeros(1)
        if self.oddity == "bias in the mask" and attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask - 0.5 * (torch.arange(k.shape[2]).flip(0))
        if self.oddity == "own softmax":
            out = F.scaled_dot_product_attention(
                q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=q.shape[2] > 1
            )
            return self.o_proj(out.transpose(1, 2).flatten(2)), None
        if self.oddity == "fails":
            raise KeyError("oddity")
        out, _ = how(self, q, k, v, attention_mask, scaling=self.scaling, **extra, **kwargs)
        if self.oddity == "attends twice":
            out = how(self, q, k, v, attention_mask, scaling=2 * self.scaling, **kwargs)[0] - out
        if self.oddity == "depends on how it is computed" and self.config._attn_implementation == "flux_ext":
            out = out * 1.01
        return self.o_proj(out.flatten(2)), None


def odd(oddity: str) -> Any:
    model = tiny()
    model.model.layers[2].self_attn = Odd(model.model.layers[2].self_attn, oddity)
    return model


def state(model: Any) -> Any:
    """All that patch could leave behind."""
    modules = {
        name: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), frozenset(vars(m)))
        for name, m in model.named_modules()
    }
    return modules, set(model.state_dict()), model.config.to_dict(), model.generation_config.to_dict()


def test_attention_like_any_other_is_patched() -> None:
    model = odd("nothing")
    flux_ext.patch(model, FluxConfig(**SMALL))


@pytest.mark.parametrize(
    "oddity, message",
    [
        ("changes values after the cache", "layer 2 differs from the unpatched model by"),
        ("reads more of the cache", "at a cached step, Odd of layer 2 differs from the unpatched model"),
        ("bias by keyword", "position_bias is not supported by flux_ext, Odd asks for"),
        ("bias in the mask", "Odd of layer 2 differs from the unpatched model by"),
        ("own softmax", r"Odd \(layer 2\) does not call its attention through transformers' AttentionInterface"),
        ("fails", "the unpatched model fails on a few tokens, KeyError"),
        ("attends twice", "layer 2 attends more than once"),
        ("depends on how it is computed", r"differs from the unpatched model by 0.01 .*rounding explains 0.001"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_attention_that_is_more_is_refused_by_name(oddity: str, message: str, training: bool) -> None:
    model = odd(oddity).train(training)
    before = state(model)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be patched: .*{message}"):
        flux_ext.patch(model, FluxConfig(**SMALL))
    assert state(model) == before and not flux_ext.is_patched(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_rounding_is_no_reason(family: str, dtype: torch.dtype) -> None:
    """Nor in a deep model, whose later layers would see quite other inputs."""
    flux_ext.patch(tiny(family, num_hidden_layers=12, layer_types=None).to(dtype), FluxConfig(**SMALL))


@pytest.mark.parametrize("how", ["dynamic int8", "no gradient", "inference mode"])
def test_models_as_people_have_them(how: str) -> None:
    model = tiny()
    if how == "dynamic int8":
        pytest.importorskip("torch.ao.quantization")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        evidence = proof.Proof(model, model.model, {0: model.model.layers[0].self_attn}, model.config)
        assert evidence.tolerance[0] == 5e-2
        return
    with torch.inference_mode() if how == "inference mode" else torch.no_grad():
        flux_ext.patch(model, FluxConfig(**SMALL))
    ids = torch.randint(2, 128, (1, 30))
    model(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=2)


def test_patch_draws_nothing_and_leaves_no_routing() -> None:
    model = tiny().train()
    config, settings = model.config.to_dict(), model.generation_config.to_dict()
    routers = flux_ext.FluxRouters(FluxConfig(num_layers=4, head_dim=16, **SMALL))
    modes, drawn = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    flux_ext.patch(model, routers=routers)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {n: m.training for n, m in model.named_modules() if "flux_router" not in n} == modes
    assert model.config.to_dict() == config and model.generation_config.to_dict() == settings
    with pytest.raises(ValueError, match="no forward"):
        last_routing(model)
    assert vars(model._flux_ext.local).get("policy") is None


def test_weights_without_effect_and_weights_that_are_not_loaded() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        flux_ext.unpatch(flux_ext.patch(model, FluxConfig(**SMALL)))
        model.model.layers[2].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 3 of the unpatched model gives values that are not finite"):
        flux_ext.patch(model, FluxConfig(**SMALL))


# --- Masks


@pytest.mark.parametrize(
    "function, window, ours",
    [
        (causal_mask_function, None, True),
        (causal_mask_function, 16, False),
        (sliding_window_overlay(16), 16, False),  # sees ahead
        (lambda b, h, q, k: (k <= q) & (k > q - 16), 16, True),
        (lambda b, h, q, k: (k <= q) & (k > q - 17), 16, False),
        (lambda b, h, q, k: (k <= q) & (k > q - 16), None, False),
        (lambda b, h, q, k: (k <= q) & chunked_overlay(8192, torch.zeros(1).long())(0, h, q, k), 8192, False),
        (lambda b, h, q, k: (k <= q) & ((k < 4) | (k > q - 16)), 16, False),  # a sink
        (lambda b, h, q, k: (k <= q) | (k == q + 1), None, False),
    ],
)
def test_masks_are_tried_far_from_the_few_tokens(function: Any, window: int | None, ours: bool) -> None:
    assert proof._masks_as_we_do(function, window) is ours


def test_a_window_that_is_not_that_of_the_cache() -> None:
    model = tiny("qwen2-sliding")
    model.model.layers[0].self_attn.sliding_window = 7
    with pytest.raises(ValueError, match="layer 0 attends in a window of 7, its cache is of 8"):
        flux_ext.patch(model, FluxConfig(**SMALL))


def test_tokens_that_see_later_ones_are_refused() -> None:
    """As those of an image do: the union of the causal mask with blocks, and only where there is a block."""
    for block, ahead in ((torch.tensor([[0, 0, -1, -1]]), True), (torch.full((1, 4), -1), False)):

        def union(b: Any, h: Any, q: Any, k: Any, block: Tensor = block) -> Tensor:
            return (block[b, q] == block[b, k]) & (block[b, q] >= 0)

        kwargs = dict(batch_size=1, q_length=4, kv_length=4, mask_function=or_masks(causal_mask_function, union))
        if ahead:
            with pytest.raises(ValueError, match="tokens that see later ones"):
                attention_function.flux_mask(**kwargs)
        else:
            assert attention_function.flux_mask(**kwargs) is None


# --- Layers that do not hand keywords on


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_that_do_not_hand_keywords_on_cannot_recompute_themselves() -> None:
    model = flux_ext.patch(tiny("nemotron"), FluxConfig(**SMALL)).train()
    ids = torch.randint(2, 128, (2, 30))
    model(ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="only inside its decoder"):
        model.model.layers[0].self_attn(torch.randn(1, 20, 64), None, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        ValueError, match="NemotronDecoderLayer does not hand keywords on .*--no-gradient-checkpointing"
    ):
        model(ids)
    assert cache_of(model.eval()(ids)) is not None
