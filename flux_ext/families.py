"""What is known of model families: where a router can see queries and keys, and what must be refused.

Queries are tapped after their norm and before the rotary embedding (Flux Attention, arXiv 2604.07394; Elastic
Attention taps the keys), by a forward hook on the submodule that makes them. ``patch`` verifies every tap with
one tiny forward, so an unknown family either works or is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORMS = {"query": ("q_norm", "q_layernorm", "query_layernorm"), "key": ("k_norm", "k_layernorm", "key_layernorm")}
PROJECTIONS = {"query": "q_proj", "key": "k_proj"}
FUSED = "qkv_proj"
"""One projection for queries, keys and values in this order (Phi-3)."""


@dataclass
class Tap:
    """The submodule whose output holds the states, and how they lie in it."""

    name: str
    begin: int | None = None
    end: int | None = None
    layout: str | None = None  # "flat" [B, S, H * D], "bshd", "bhsd"; settled by the probe

    def states(self, output: Tensor, head_dim: int) -> Tensor:
        """The states as ``[B, S, H, D]``."""
        return _arrange(output[..., self.begin : self.end], self.layout, head_dim)

    def settle(self, output: Tensor, head_dim: int, given: Tensor, rotated: Any) -> bool:
        """Finds the layout in which the output, rotated or not, is what the attention was ``given``.

        given ``[B, H, S, D]``; rotated: function of states of that shape.
        """
        output = output[..., self.begin : self.end]
        for layout in ("flat",) if output.dim() == 3 else ("bhsd", "bshd"):
            if output.dim() == 3 and output.shape[-1] % head_dim:
                return False
            states = _arrange(output, layout, head_dim).transpose(1, 2)
            if states.shape == given.shape and any(_close(x, given) for x in (rotated(states), states)):
                self.layout = layout
                return True
        return False


def _arrange(output: Tensor, layout: str | None, head_dim: int) -> Tensor:
    if layout == "flat":
        return output.unflatten(-1, (-1, head_dim))
    return output.transpose(1, 2) if layout == "bhsd" else output


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-2 * b.abs().max())


def find_tap(attention: nn.Module, kind: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tap | None:
    """Where ``kind`` ("query" or "key") states leave a submodule, before the rotary embedding."""
    for name in (*NORMS[kind], PROJECTIONS[kind]):
        if isinstance(getattr(attention, name, None), nn.Module):
            return Tap(name)
    if isinstance(getattr(attention, FUSED, None), nn.Module):
        queries, keys = num_q_heads * head_dim, (num_q_heads + num_kv_heads) * head_dim
        return Tap(FUSED, 0, queries) if kind == "query" else Tap(FUSED, queries, keys)
    return None


def rotary(attention: nn.Module, cos_sin: tuple[Tensor, Tensor]):
    """The family's own rotary embedding as a function of states ``[B, H, S, D]``."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)

    def rotated(states: Tensor) -> Tensor:
        if apply is None:
            return states
        return apply(states, states, *(x.to(states.device) for x in cos_sin))[0]

    return rotated


def refuse_unsupported(model: nn.Module, decoder: nn.Module, text_config: Any) -> None:
    """Raises ValueError, naming the reason, for models whose attention this package cannot compute."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model: only decoder-only models can be patched")
    if getattr(text_config, "kv_lora_rank", None):
        raise ValueError(f"{name} uses multi-head latent attention (kv_lora_rank): it cannot be patched")
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{name} has no decoder layers of a known form ({type(decoder).__name__}.layers)")
    if getattr(text_config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{name} soft-caps its attention scores (attn_logit_softcapping="
            f"{text_config.attn_logit_softcapping}), which the kernels do not compute; "
            "set config.attn_logit_softcapping = None before patching to go without"
        )
    if getattr(text_config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends in both directions (use_bidirectional_attention): it cannot be patched")


def attention_of(layer: nn.Module, index: int) -> nn.Module:
    """The self-attention of one decoder layer."""
    found = [
        m
        for m in layer.modules()
        if getattr(m, "layer_idx", None) == index and (hasattr(m, PROJECTIONS["query"]) or hasattr(m, FUSED))
    ]
    if len(found) != 1:
        raise ValueError(f"layer {index} ({type(layer).__name__}) has {len(found)} known attention modules, not 1")
    attention = found[0]
    if getattr(attention, "sinks", None) is not None:
        raise ValueError(f"{type(attention).__name__} has learned attention sinks (s_aux): it cannot be patched")
    if not getattr(attention, "is_causal", True):
        raise ValueError(f"{type(attention).__name__} is not causal: it cannot be patched")
    return attention


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: of its weights, or where accelerate brings offloaded ones."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks: list[Any] = [getattr(m, "_hf_hook", None) for m in module.modules()]
    places = [place for h in hooks if (place := getattr(h, "execution_device", None)) is not None]
    if not places:
        raise ValueError(f"{type(module).__name__} has no weights yet (device meta): load them before patching")
    return torch.device(places[0])


def probe_tokens(text_config: Any, device: torch.device) -> Tensor:
    """A few tokens ``[1, 9]`` for the forward with which ``patch`` checks itself."""
    return (torch.arange(9, device=device) * 7919 % text_config.vocab_size)[None]
