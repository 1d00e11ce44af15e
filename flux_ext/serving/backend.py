"""Routed attention inside a model that vLLM has loaded: where its layers are changed, and what they call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..operators.patterns import Streaming
from ..routers.collection import FluxRouters
from .layers import RoutedLayer
from .page_manager import RoutedPagesSpec
from .pages import pages_of, store
from .requests import Requests
from .steps import Step, Steps
from .vllm_seam import (
    Attention,
    AttentionType,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    metadata_of,
    missing,
)

_ROUTED = "flux_ext_layer"
"""Where an attention layer of vLLM holds its :class:`RoutedLayer`."""


class RoutedAttention:
    """Attention of the layers that have a router, by this package's operators over vLLM's pages; of others, vLLM's: the
    implementation that a class derives from beside this one."""

    scale: float

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if getattr(layer, _ROUTED, None) is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        else:
            store(key[: len(slot_mapping)], value[: len(slot_mapping)], *pages_of(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        tap: Tap | None = getattr(layer, _ROUTED, None)
        if tap is None or attn_metadata is None:
            return super().forward(  # type: ignore[misc,no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        tokens = attn_metadata.num_actual_tokens
        k_pages, v_pages = pages_of(kv_cache)
        step = tap.step(attn_metadata)
        page_table = attn_metadata.block_table[
            : len(attn_metadata.seq_lens), : -(-attn_metadata.max_seq_len // k_pages.shape[1])
        ]
        output[:tokens] = tap.routed.attend(query[:tokens], k_pages, v_pages, page_table, step, self.scale)
        return output


class RoutedImplementation(RoutedAttention, CPUAttentionBackendImpl):  # type: ignore[misc]
    """On the CPU."""


class RoutedMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Leaves out what only vLLM's own attention needs, where all layers of a group have routers."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        layers = self.vllm_config.compilation_config.static_forward_context
        if not all(hasattr(layers[name], _ROUTED) for name in self.layer_names):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return CPUAttentionMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            max_query_len=common_attn_metadata.max_query_len,
            query_start_loc=common_attn_metadata.query_start_loc,
            max_seq_len=common_attn_metadata.max_seq_len,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            slot_mapping=common_attn_metadata.slot_mapping,
            scheduler_metadata=None,
        )


class RoutedBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's backend for CPUs, with routed layers."""

    @staticmethod
    def get_impl_cls() -> type:
        return RoutedImplementation

    @staticmethod
    def get_builder_cls() -> type:
        return RoutedMetadataBuilder


class Tap(nn.Module):
    """A rotary embedding in whose inputs one layer's router sees queries and keys before they are rotated.

    vLLM's layers share one rotary embedding, so each gets a tap of its own in front of it.
    """

    def __init__(self, rotary: nn.Module, routed: RoutedLayer, attention: Any, steps: Steps) -> None:
        super().__init__()
        self.rotary, self.routed, self.steps = rotary, routed, steps
        self.layer_name = attention.layer_name
        heads = attention.num_kv_heads if routed.router.per_head else attention.num_heads
        self._shape = (heads, attention.head_size)

    def step(self, metadata: Any) -> Step:
        """The step that attention was told of."""
        group = self.steps.requests.groups.get(self.routed.index)
        if group is None:
            raise RuntimeError(f"{self.layer_name} has a router, but its pages belong to no known group")
        tensors = metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        return self.steps.step(group, *tensors, metadata.max_query_len)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (metadata := metadata_of(self.layer_name)) is not None:
            states = key if self.routed.router.per_head else query
            self.routed.see(states.reshape(len(states), *self._shape), self.step(metadata))
        return self.rotary(positions, query, key, *args, **kwargs)


def routed_layers(vllm_config: Any) -> dict[str, RoutedLayer]:
    """The layers of a loaded model that have a router, by their names.

    Raises:
        RuntimeError: there are none: the model was loaded in a way that this package does not see.
    """
    layers = vllm_config.compilation_config.static_forward_context
    found = {name: tap.routed for name, layer in layers.items() if (tap := getattr(layer, _ROUTED, None)) is not None}
    if not found:
        raise RuntimeError(f"no layer of the model has a router (load_format {vllm_config.load_config.load_format})")
    return found


def install(model: nn.Module, routers: FluxRouters) -> None:
    """Gives the layers of a loaded model their routers.

    Raises:
        ValueError: routers and model do not fit, or a layer is of a form that cannot be routed.
    """
    config, requests = routers.config, Requests()
    steps = Steps(requests, config)
    parents = attention_parents(model)
    device = next(model.parameters()).device
    for index, router in zip(config.routed_layers(), routers.to(device).layers, strict=True):
        if index not in parents:
            raise ValueError(f"the routers have layer {index}, the model {len(parents)} layers with attention")
        parent = parents[index]
        attention = parent.attn
        refuse_layer(attention, index)
        routed = RoutedLayer(index, router, config, requests)  # type: ignore[arg-type]
        tap = Tap(parent.rotary_emb, routed, attention, steps)
        parent.rotary_emb = tap
        attention.__dict__[_ROUTED] = tap  # not as a submodule: it is one of its parent's
    for index, parent in parents.items():
        if parent.attn.sliding_window is None:
            _own_pages(parent.attn, index, config.streaming())


def attention_parents(model: nn.Module) -> dict[int, Any]:
    """The modules that hold attention (``attn``) and a rotary embedding, by the number of their layer.

    Raises:
        ValueError: a layer has none, or attention stands elsewhere: this family is not known.
    """
    layers = {m.layer_name: m for m in model.modules() if isinstance(m, Attention)}
    parents = {}
    for module in model.modules():
        attention = getattr(module, "attn", None)
        if isinstance(attention, Attention) and isinstance(getattr(module, "rotary_emb", None), nn.Module):
            numbers = [int(part) for part in attention.layer_name.split(".") if part.isdigit()]
            if len(numbers) != 1 or numbers[0] in parents:
                raise ValueError(f"{type(model).__name__}: {attention.layer_name} does not tell its layer")
            parents[numbers[0]] = module
            del layers[attention.layer_name]
    if layers or not parents:
        names = ", ".join(sorted(layers)[:2]) or "no layer"
        raise ValueError(
            f"{type(model).__name__} cannot be routed: attn and rotary_emb side by side expected ({names})"
        )
    return parents


def refuse_layer(attention: Any, index: int) -> None:
    """ValueError where a layer's attention is more than scaled, causal and over all earlier keys."""
    implementation = attention.impl
    if not isinstance(implementation, RoutedImplementation):
        raise missing(f"the CPU's attention backend in layer {index} ({type(implementation).__name__} is there)")
    reasons = {
        "has a sliding window of its own": attention.sliding_window is not None,
        "is not causal": attention.attn_type != AttentionType.DECODER,
        "has learned sinks": implementation.sinks is not None,
        "soft-caps its scores": bool(implementation.logits_soft_cap),
        "has ALiBi slopes": implementation.alibi_slopes is not None,
        "has values of another width": attention.head_size_v != attention.head_size,
        "shares another layer's keys and values": attention.kv_sharing_target_layer_name is not None,
        "has quantised keys and values": attention.kv_cache_torch_dtype.itemsize < 2,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"layer {index} {reason}: it cannot be routed")


def _own_pages(attention: Any, index: int, pattern: Streaming) -> None:
    """Lets a layer ask for pages of its own, one with a router or without: vLLM's groups are of one size."""
    stock = attention.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> RoutedPagesSpec:
        return RoutedPagesSpec.of(stock(vllm_config), index, pattern)

    attention.get_kv_cache_spec = get_kv_cache_spec
