"""What is known of model families: where a router can see queries and keys, and what must be refused.

Queries are tapped after their norm and before the rotary embedding (Flux Attention, arXiv 2604.07394; Elastic
Attention taps the keys), by a forward hook on the submodule that makes them. ``patch`` verifies every tap with
one tiny forward, so an unknown family either works or is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..transformers_seam import offloaded_to, setting, tensor_parallel_size

NORMS = {"query": ("q_norm", "q_layernorm", "query_layernorm"), "key": ("k_norm", "k_layernorm", "key_layernorm")}
PROJECTIONS = {"query": "q_proj", "key": "k_proj"}
FUSED = ("qkv_proj", "query_key_value")
"""One projection for queries, keys and values."""


@dataclass
class Tap:
    """The submodule ``name`` whose output holds the states of one ``kind``, and how they lie in it.

    ``fused`` outputs hold all of ``[Q | K | V]`` ("flat"; Phi-3) or the same group by group ("grouped": the queries
    of a KV head, its key, its value; GPT-NeoX). ``norm`` is a submodule still to be applied: families that norm what
    the rotary embedding gives (Hunyuan).
    """

    kind: str
    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    fused: str | None = None
    norm: str | None = None
    layout: str | None = None  # "flat" [B, S, H * D], "bshd", "bhsd"

    def states(self, output: Tensor, attention: nn.Module) -> Tensor:
        """The states as ``[B, S, H, D]``."""
        q, kv = self.num_q_heads, self.num_kv_heads
        states: Tensor
        if self.fused == "grouped":
            groups = output.unflatten(-1, (kv, q // kv + 2, self.head_dim))
            states = groups[..., : q // kv, :].flatten(2, 3) if self.kind == "query" else groups[..., q // kv, :]
        elif self.layout == "flat":
            states = output.unflatten(-1, (-1, self.head_dim))
            if self.fused:
                states = states[..., :q, :] if self.kind == "query" else states[..., q : q + kv, :]
        else:
            states = output.transpose(1, 2) if self.layout == "bhsd" else output
        if self.norm is None:
            return states
        norm: Callable[[Tensor], Tensor] = getattr(attention, self.norm)
        return norm(states)

    def sees(self, output: Tensor, given: Tensor, attention: nn.Module) -> bool:
        """Whether this tap gives what a router must see: states from before the rotary embedding.

        ``output`` and what attention was ``given``, ``[2, H, S, D]``, come from the forward of
        :func:`flux_ext.models.proof.look`. In its first row all tokens stand at position 0, where the embedding changes
        nothing: there the states must be those that attention was given. In its second row the same tokens stand at
        another position: states from before the embedding are the same in both rows.

        A rotary embedding may scale the features it rotates (YaRN), by one factor, also at position 0.
        """
        try:
            states = self.states(output, attention).transpose(1, 2)
        except (RuntimeError, IndexError):  # another shape
            return False
        if states.shape != given.shape or not _close(states[1], states[0]):
            return False
        states, given = states[0].float(), given[0].float()
        factor = (states * given).sum((0, 1)) / (states * states).sum((0, 1)).clamp_min(1e-30)
        plain = (factor - 1).abs() <= 2e-2
        return _close(states * torch.where(plain, torch.ones_like(factor), factor[0]), given)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-2 * b.abs().max())


def tapped_names(attention: nn.Module) -> list[str]:
    """Submodules that may make queries or keys."""
    names = [*NORMS["query"], *NORMS["key"], *PROJECTIONS.values(), *FUSED]
    return [name for name in names if isinstance(getattr(attention, name, None), nn.Module)]


def find_tap(
    kind: str, attention: nn.Module, given: Tensor, heads: tuple[int, int, int], outputs: Mapping[str, Tensor]
) -> Tap:
    """Where ``kind`` ("query" or "key") states leave a submodule before the rotary embedding, after their norm.

    Args:
        given: the states that attention was given, ``[2, H, S, D]``, in the forward of
            :func:`flux_ext.models.proof.look`.
        outputs: of the submodules, by name, in the same forward.
        heads: num_q_heads, num_kv_heads, head_dim.

    Raises:
        ValueError: none is known that does; the message names those tried.
    """
    norms = [name for name in NORMS[kind] if name in outputs]
    taps = [Tap(kind, name, *heads, layout=layout) for name in norms for layout in ("flat", "bhsd", "bshd")]
    for norm in (None, *(n for n in NORMS[kind] if isinstance(getattr(attention, n, None), nn.Module))):
        taps.append(Tap(kind, PROJECTIONS[kind], *heads, norm=norm, layout="flat"))
        for name in FUSED:
            taps += [Tap(kind, name, *heads, fused=how, norm=norm, layout="flat") for how in ("flat", "grouped")]
    for tap in taps:
        if tap.name in outputs and tap.sees(outputs[tap.name], given, attention):
            return tap
    tried = ", ".join(dict.fromkeys(tap.name for tap in taps if tap.name in outputs)) or "none is known"
    raise ValueError(
        f"{type(attention).__name__}: no submodule gives its {kind} states before a rotary embedding, the same at "
        f"every position (tried: {tried})"
    )


def decoder_of(model: Any) -> Any:
    """The module that has the layers: not always what ``get_decoder`` gives, as some families call the output head
    decoder."""
    found = [model.get_decoder(), model.base_model, getattr(model, "model", None)]
    return next((m for m in found if isinstance(getattr(m, "layers", None), nn.ModuleList)), found[0])


def refuse_unsupported(model: nn.Module, decoder: nn.Module, text_config: Any) -> None:
    """Raises ValueError, naming the reason, for models whose attention this package cannot compute."""
    name = type(model).__name__
    if (size := tensor_parallel_size(model)) > 1:
        raise ValueError(
            f"{name} is sharded by a tensor-parallel plan over {size} processes, so that each has some of the heads: "
            "it cannot be patched"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model: only decoder-only models can be patched")
    if setting(text_config, "kv_lora_rank"):
        raise ValueError(f"{name} uses multi-head latent attention (kv_lora_rank): it cannot be patched")
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{name} has no decoder layers of a known form ({type(decoder).__name__}.layers)")
    if softcap := setting(text_config, "attn_logit_softcapping"):
        raise ValueError(
            f"{name} soft-caps its attention scores (attn_logit_softcapping={softcap}), which the kernels do not "
            "compute; set config.attn_logit_softcapping = None before patching to go without"
        )
    if setting(text_config, "use_bidirectional_attention"):
        raise ValueError(f"{name} attends in both directions (use_bidirectional_attention): it cannot be patched")


def attention_of(layer: nn.Module, index: int) -> nn.Module:
    """The self-attention of one decoder layer."""
    found = [m for m in layer.modules() if getattr(m, "layer_idx", None) == index and tapped_names(m)]
    if len(found) != 1:
        names = ", ".join(type(m).__name__ for m in found)
        raise ValueError(
            f"layer {index} ({type(layer).__name__}) has {len(found)} attention modules of a known form, not 1: {names}"
        )
    attention = found[0]
    if getattr(attention, "sinks", None) is not None:
        raise ValueError(f"{type(attention).__name__} has learned attention sinks (s_aux): it cannot be patched")
    if not getattr(attention, "is_causal", True):
        raise ValueError(f"{type(attention).__name__} is not causal: it cannot be patched")
    return attention


def device_of(module: nn.Module, model: nn.Module | None = None) -> torch.device:
    """Where a module computes: of its weights, or where accelerate brings offloaded ones.

    Packed int8 weights are no parameters of their module: it is taken to be where its ``model`` is.
    """
    first: Tensor | None = next(itertools.chain(module.parameters(), module.buffers()), None)
    if first is not None and first.device.type != "meta":
        return first.device
    if places := offloaded_to(module):
        return torch.device(places[0])
    if first is not None or model is None:
        raise ValueError(f"{type(module).__name__} has no weights yet (device meta): load them before patching")
    return device_of(model)


def is_on(module: nn.Module, device: torch.device) -> bool:
    """Whether all parameters of a module are on a device (any of its type where it has no index)."""
    return all(p.device.type == device.type and device.index in (None, p.device.index) for p in module.parameters())
