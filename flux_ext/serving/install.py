"""Where a model that vLLM has loaded is changed: its layers get routers, our attention and pages of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..operators.patterns import Streaming
from ..routers.collection import FluxRouters
from .backend import ROUTED, RoutedBackend, RoutedImplementation, RoutedMetadata
from .layers import RoutedLayer
from .page_manager import RoutedPagesSpec
from .requests import Requests
from .steps import Step, Steps
from .vllm_seam import Attention, AttentionBackendEnum, AttentionType, current_platform, metadata_of, missing


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

    def step(self, metadata: RoutedMetadata) -> Step:
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
    found = {name: tap.routed for name, layer in layers.items() if (tap := getattr(layer, ROUTED, None)) is not None}
    if not found:
        raise RuntimeError(f"no layer of the model has a router (load_format {vllm_config.load_config.load_format})")
    return found


def install(model: nn.Module, routers: FluxRouters) -> None:
    """Gives the layers of a loaded model their routers, and those that have one our attention.

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
        implementation = implementation_for(attention, index)
        tap = Tap(parent.rotary_emb, RoutedLayer(index, router, config, requests), attention, steps)  # type: ignore[arg-type]
        parent.rotary_emb = tap
        attention.__dict__[ROUTED] = tap  # not as a submodule: it is one of its parent's
        attention.impl, attention.attn_backend = implementation, RoutedBackend
        attention.backend = AttentionBackendEnum[RoutedBackend.get_name()]
    for index, parent in parents.items():
        if type(parent.attn) is Attention and parent.attn.sliding_window is None:
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


def implementation_for(attention: Any, index: int) -> RoutedImplementation:
    """Our attention in the place of a layer's own.

    Raises:
        ValueError: the layer's is more than scaled, causal and over all earlier keys, or of sizes that ours does not
            take.
        ImportError: the layer's does not say what it is.
    """
    own = attention.impl
    for name in ("scale", "alibi_slopes", "logits_soft_cap", "sinks"):
        if not hasattr(own, name):
            raise missing(f"{name} of the attention in layer {index} ({type(own).__name__})")
    capability = None if current_platform.is_cpu() else current_platform.get_device_capability()
    reasons = {
        f"is a {type(attention).__name__}": type(attention) is not Attention,
        "has a sliding window of its own": attention.sliding_window is not None,
        "is not causal": attention.attn_type != AttentionType.DECODER,
        "sees the later tokens of an image": attention.use_mm_prefix,
        "has learned sinks": own.sinks is not None,
        "soft-caps its scores": bool(own.logits_soft_cap),
        "has ALiBi slopes": own.alibi_slopes is not None,
        "has values of another width": attention.head_size_v != attention.head_size,
        f"has head_dim {attention.head_size}": not RoutedBackend.supports_head_size(attention.head_size),
        "shares another layer's keys and values": attention.kv_sharing_target_layer_name is not None,
        f"has keys and values in {attention.kv_cache_dtype}": not RoutedBackend.supports_kv_cache_dtype(
            attention.kv_cache_dtype
        ),
        f"computes in {attention.dtype}": not RoutedBackend.supports_dtype(attention.dtype)
        or (capability is not None and attention.dtype.itemsize != 2),
        f"computes in {attention.dtype} and keeps keys and values in {attention.kv_cache_torch_dtype}": (
            attention.kv_cache_torch_dtype != attention.dtype
        ),
        f"is on a GPU of compute capability {capability}": capability is not None
        and not RoutedBackend.supports_compute_capability(capability),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"layer {index} {reason}: it cannot be routed")
    return RoutedImplementation(attention.num_heads, attention.head_size, own.scale, attention.num_kv_heads)


def _own_pages(attention: Any, index: int, pattern: Streaming) -> None:
    """Lets a layer ask for pages of its own, one with a router or without: vLLM's groups are of one size."""
    stock = attention.get_kv_cache_spec

    def get_kv_cache_spec(vllm_config: Any) -> RoutedPagesSpec:
        return RoutedPagesSpec.of(stock(vllm_config), index, pattern)

    attention.get_kv_cache_spec = get_kv_cache_spec
