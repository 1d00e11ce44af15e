"""The attention and mask functions that transformers calls for ``attn_implementation="flux_ext"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import operators
from ..forward_context import ForwardContext
from ..operators import KeyValues, Routing
from ..operators.patterns import Streaming
from ..transformers_seam import (
    ATTENTION_TERMS,
    UNKNOWN_KEYWORDS,
    AttentionInterface,
    AttentionMaskInterface,
    attends_ahead,
)

if TYPE_CHECKING:
    from .patched_attention import PatchedAttention

NAME = "flux_ext"

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
"""What the kernels compute in: attention on CUDA in half precision, all others in each of these."""


def flux_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query ``[B, Hq, S, D]``, key and value ``[B, Hkv, T, D]`` -> ``[B, S, Hq, D]``.

    The padding mask is not looked at: the sequences' bounds were read off it once per forward.
    """
    patched = getattr(module, "_flux_ext", None)
    if patched is None:
        raise RuntimeError(f"{type(module).__name__} has attn_implementation={NAME!r} but was not patched")
    refuse_terms(module, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _check_window(patched, sliding_window)
    context, cache_layer, route = patched.current()
    if torch.is_autocast_enabled(value.device.type):  # of an fp32 model, whose rotary embedding then gives fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    check_dtype(query, HALF if query.is_cuda else FLOATS)
    q = query.transpose(1, 2)
    if cache_layer is not None and cache_layer.continues:
        return cache_layer.attend(q, scaling, context), None
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if context.shard is not None:
        q, k, v = context.shard.by_heads(q, k, v)
        route = None if route is None else context.shard.own_heads(route)
    out = _attend(patched, q, k, v, route, scaling, context)
    if cache_layer is not None:
        cache_layer.prompt_attended()
    return out if context.shard is None else context.shard.by_tokens(out), None


def _attend(
    patched: PatchedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor | None,
    scaling: float,
    context: ForwardContext,
) -> Tensor:
    """Attention ``[B, S, Hq, D]`` over the keys and values of the forward itself, or what a stock cache gave."""
    if patched.window is not None:
        return _sliding(q, k, v, scaling, context, patched.window)
    prompt, answer = patched.routings(route, context)
    end = context.prompt_end(q)
    if context.cu_seqlens is not None:
        return operators.attention_after_prompt(
            q[0], k[0], v[0], prompt, answer, end, scale=scaling, cu_seqlens=context.cu_seqlens
        )[None]
    bounds = {"seq_start": context.seq_start, "seq_end": context.seq_end}
    return operators.attention_after_prompt(q, k, v, prompt, answer, end, scale=scaling, **bounds)


def _check_window(patched: PatchedAttention, sliding_window: int | None) -> None:
    """ValueError where a module asks for another sliding window than its cache has."""
    if sliding_window is None or sliding_window == patched.window:
        return
    if patched.window is None:
        raise ValueError(f"layer {patched.index} has a sliding window of its own ({sliding_window}): it is not routed")
    raise ValueError(f"layer {patched.index} asks for a window of {sliding_window}, its cache has {patched.window}")


def check_dtype(x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """ValueError where a model's queries or keys are in a dtype that the kernels do not take."""
    if x.dtype in allowed:
        return
    got, *names = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, *allowed))
    take, autocast = ("torch.bfloat16", ", or run it under torch.autocast") if x.is_cuda else ("torch.float32", "")
    raise ValueError(
        f"the model must compute in {', '.join(names[:-1])} or {names[-1]} on {x.device.type}, its dtype is {got}: "
        f"load it with dtype={take}, or call model.to({take}){autocast}"
    )


def refuse_terms(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """ValueError where a module asks its attention function for something that the kernels do not compute."""
    for name in (*ATTENTION_TERMS, *UNKNOWN_KEYWORDS):
        given = kwargs.get(name)
        if given is not None and (isinstance(given, Tensor) or given):
            what = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else given
            raise ValueError(f"{name} is not supported by flux_ext, {type(module).__name__} asks for {what}")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} asks for attention in both directions (is_causal=False)")


def _sliding(q: Tensor, k: Tensor, v: Tensor, scale: float, context: ForwardContext, window: int) -> Tensor:
    """A layer with a sliding window of its own: streaming without a sink, over what its stock cache gives."""
    pattern = Streaming(sink=0, window=window)
    if context.cu_seqlens is not None:
        return operators.attention(q[0], k[0], v[0], full=pattern, scale=scale, cu_seqlens=context.cu_seqlens)[None]
    if context.mask is not None and context.has_holes(k.shape[1]):
        return _sliding_with_holes(q, k, v, scale, context.mask[:, -k.shape[1] :], window)
    kv_begin, kv_end = context.kv_bounds(k.shape[1])
    q_begin, q_end = context.q_bounds(q.shape[1])
    return operators.attend(
        q, KeyValues(k, v, kv_begin, kv_end), Routing(None, pattern, pattern), scale, q_begin, q_end
    )[0]


def _sliding_with_holes(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, window: int) -> Tensor:
    """The same where padding lies between the keys, which row bounds cannot say. The stock cache keeps no more than
    the window and the new tokens, so a dense mask is small. Padding counts in the window, as in the stock model."""
    slot = torch.arange(k.shape[1], device=k.device)
    position = slot[-q.shape[1] :, None]
    inside = (slot <= position) & (slot > position - window)
    visible = (inside & mask[:, None]) | (slot == position)  # [B, S, T]; a row of padding sees itself, never nothing
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible[:, None], scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def flux_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask ``[B, kv_length]`` or None: never a dense one. Over a static cache it is filled up to the
    cache's length, so that all steps have one shape."""
    if use_vmap:
        raise ValueError("flux_ext attention is causal: mask functions of a model's own are not supported")
    if attends_ahead(mask_function) and _some_attend_ahead(mask_function, batch_size, q_length, q_offset):
        raise ValueError("flux_ext attention is causal: tokens that see later ones, as an image's, are not supported")
    if attention_mask is not None and attention_mask.shape[1] < kv_offset + kv_length:
        return F.pad(attention_mask, (0, kv_offset + kv_length - attention_mask.shape[1]))
    return attention_mask


def _some_attend_ahead(mask_function: Any, batch_size: int, q_length: int, q_offset: int) -> bool:
    """Whether some query sees the key after it. Waits for the device; only few mask functions could allow it."""
    q = torch.arange(q_length - 1) + q_offset
    rows = torch.arange(batch_size)[:, None]
    return bool(torch.as_tensor(mask_function(rows, 0, q, q + 1)).any())


def register() -> None:
    """Registers both functions with transformers."""
    AttentionInterface.register(NAME, flux_attention)
    AttentionMaskInterface.register(NAME, flux_mask)
