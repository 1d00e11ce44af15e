"""Tiny random models of every family, and what tests of patched ones share."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import flux_ext
from flux_ext.models.patching import get_routers, last_routing

SMALL: dict[str, Any] = {"sink": 4, "window": 16, "pool_size": 20}
"""A pattern that drops most of the tests' prompts."""
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": MIXED},
    ),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": None, "sliding_window": 8, "layer_types": MIXED}),
    "gemma3": ("Gemma3", {"sliding_window": 8, "layer_types": MIXED}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 8, "layer_types": MIXED}),
    "ernie4_5": ("Ernie4_5", {}),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": MIXED}),
    "gemma": ("Gemma", {}),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "granite": ("Granite", {}),
    "helium": ("Helium", {}),
    "hunyuan": ("HunYuanDenseV1", {}),
    "jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "ministral": ("Ministral", {"sliding_window": 8, "layer_types": MIXED}),
    "nemotron": ("Nemotron", {}),
    "olmo": ("Olmo", {}),
    "olmo3": ("Olmo3", {"sliding_window": 8, "layer_types": MIXED}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "persimmon": ("Persimmon", {}),
    "phi": ("Phi", {}),
    "phi, norms": ("Phi", {"qk_layernorm": True}),
    "phi3, partial": ("Phi3", {"sliding_window": None, "partial_rotary_factor": 0.75}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    "seed_oss": ("SeedOss", {}),
    "smollm3": ("SmolLM3", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}}),
}
"""Families that differ in where queries and keys can be tapped, in their rotary embedding or beside attention."""


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A model in evaluation mode whose weights are large enough that attention matters."""
    name, own = {**FAMILIES, **OTHERS}[family]
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    config = config_class(**{**BASE, **own, **changes})
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return model


def ragged(lengths: tuple[int, ...] = (60, 43, 55), side: str = "left") -> tuple[Tensor, Tensor]:
    """Token ids and padding mask ``[B, S]`` of random prompts of these lengths."""
    width = max(lengths)
    ids = torch.randint(2, 128, (len(lengths), width))
    rows = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    mask = (rows >= width - n) if side == "left" else (rows < n)
    return ids * mask, mask.long()


def scramble(routers: nn.Module, scale: float = 0.4) -> None:
    """Random routers that decide differently by layer and prompt."""
    with torch.no_grad():
        for name, p in routers.named_parameters():
            p.normal_(0, scale if name.endswith("weight") else 0.0)


def patched_model(family: str = "llama", granularity: str = "layer", **changes: Any) -> Any:
    """A tiny model whose routers are scrambled."""
    model = flux_ext.patch(tiny(family, **changes), flux_ext.FluxConfig(granularity=granularity, **SMALL))
    scramble(get_routers(model))
    return model


def routes_and_logits(model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of one forward: routes ``[B, L, Hkv]``, the routers' logits ``[B, L, (Hkv,) 2]`` and the model's."""
    output = model(*args, use_cache=False, **kwargs).logits
    routing = last_routing(model)
    assert routing.logits is not None
    return routing.routes, routing.logits, output
