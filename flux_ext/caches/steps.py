"""A cache layer's two steps as operators, so that a compiled forward over the dynamic cache is one graph.

The dynamic cache keeps its books on the host, in Python, which a graph cannot hold. An operator can: the compiler does
not look into it. An operator takes no Python object, though. So each cache layer has a number, under which it is found
here; and the number is handed over in a tensor on the CPU (``handle``), because a plain number would become a constant
of the graph, and each new cache would compile anew.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_cache_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Not to be captured in CUDA graphs: a replay would skip what they do on the host.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.compiler.disable(
    reason="a cache keeps its books on the host, so it cannot be made inside a graph: give the forward one that was "
    "made outside (flux_ext.FluxCache or FluxStaticCache), as generate does"
)
def new_handle(cache_layer: Any) -> Tensor:
    """int64 ``[1]`` on the CPU: what the operators take for a cache layer."""
    number = next(_numbers)
    _cache_layers[number] = cache_layer
    with torch.inference_mode(False):
        return torch.tensor([number], device="cpu")


def _cache_layer(handle: Tensor) -> Any:
    return _cache_layers[int(handle)]


# The handle is said to be written to, though it is not: so the compiler keeps this call, which has no result, and keeps
# it before the call of cache_attend that reads the same handle.
@torch.library.custom_op(
    "flux_ext::cache_store",
    mutates_args=("handle",),
    schema="(Tensor(a!) handle, Tensor k, Tensor v, Tensor route, Tensor? mask) -> ()",
    tags=_TAGS,
)
def store(handle: Tensor, k: Tensor, v: Tensor, route: Tensor, mask: Tensor | None) -> None:
    """A cache layer's ``store``: a forward's keys and values ``[B, Hkv, S, D]``."""
    _cache_layer(handle).store(k, v, route, mask)


@store.register_fake
def _(handle, k, v, route, mask):
    return None


@torch.library.custom_op(
    "flux_ext::cache_attend",
    mutates_args=(),
    schema="(Tensor handle, Tensor q, Tensor route, Tensor? q_begin, Tensor? q_end, float scale) -> Tensor",
    tags=_TAGS,
)
def attend(
    handle: Tensor, q: Tensor, route: Tensor, q_begin: Tensor | None, q_end: Tensor | None, scale: float
) -> Tensor:
    """A cache layer's ``attend_stored``: queries ``[B, S, Hq, D]`` over everything stored."""
    return _cache_layer(handle).attend_stored(q, route, q_begin, q_end, scale)


@attend.register_fake
def _(handle, q, *args):
    return q.new_empty(q.shape)


@torch.library.custom_op("flux_ext::cache_gradient", mutates_args=(), schema="(Tensor grad) -> Tensor")
def refuse_gradient(grad: Tensor) -> Tensor:
    """The backward pass: an error. It is an operator of its own because the backward pass is traced even where it is
    never run, and tracing must not raise it yet."""
    raise RuntimeError("attention over a cache has no gradient: it is for inference, leave the cache out to train")


@refuse_gradient.register_fake
def _(grad):
    return torch.empty_like(grad)


def _backward(ctx, grad):
    return None, refuse_gradient(grad), None, None, None, None


attend.register_autograd(_backward)
