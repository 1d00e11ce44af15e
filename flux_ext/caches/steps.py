"""A cache's steps as operators, so that a compiled forward is one graph.

The dynamic cache keeps its books on the host. In a graph its steps are operators that the compiler does not look
into. They name their layer by a handle, a tensor on the CPU with a number: as a number it would be a constant of
the graph, and every new cache would compile a new one.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Replaying a CUDA graph would skip what they do on the host.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.compiler.disable
def new_handle(layer: Any) -> Tensor:
    """int64 ``[1]`` on the CPU: what the operators take for a cache layer."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):
        return torch.tensor([number], device="cpu")


def _layer(handle: Tensor) -> Any:
    return _layers[int(handle)]


# The handle counts as written, so that what a layer stores comes before what it then reads, and is never left out.
@torch.library.custom_op(
    "flux_ext::cache_store",
    mutates_args=("handle",),
    schema="(Tensor(a!) handle, Tensor k, Tensor v, Tensor route, Tensor? mask) -> ()",
    tags=_TAGS,
)
def store(handle: Tensor, k: Tensor, v: Tensor, route: Tensor, mask: Tensor | None) -> None:
    """A layer's ``store``: a forward's keys and values ``[B, Hkv, S, D]``."""
    _layer(handle).store(k, v, route, mask)


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
    """A layer's ``attend_stored``: queries ``[B, S, Hq, D]`` over everything stored."""
    return _layer(handle).attend_stored(q, route, q_begin, q_end, scale)


@attend.register_fake
def _(handle, q, *args):
    return q.new_empty(q.shape)


@torch.library.custom_op("flux_ext::cache_gradient", mutates_args=(), schema="(Tensor grad) -> Tensor")
def refuse_gradient(grad: Tensor) -> Tensor:
    """Stands in the graph of the backward pass, which is compiled even where it is never run."""
    raise RuntimeError("attention over a cache has no gradient: it is for inference, leave the cache out to train")


@refuse_gradient.register_fake
def _(grad):
    return torch.empty_like(grad)


def _backward(ctx, grad):
    return None, refuse_gradient(grad), None, None, None, None


attend.register_autograd(_backward)
