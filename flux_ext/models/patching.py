"""Routed attention in a stock transformers model, through its public extension points.

    flux_ext.patch(model, FluxConfig(...))      # or routers="folder-or-hub-id"
    model.generate(...)
    flux_ext.unpatch(model)

One forward: a pre-hook on the decoder reads the sequences' bounds off the mask and makes the cache; hooks on
each attention module hand its queries (or keys) to the router and keep the decision in the cache layer; the
registered attention function computes. State between hooks of one forward is per thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import FluxConfig
from ..forward_context import Decision, Policy
from ..operators.arguments import described
from ..routers.collection import FluxRouters
from ..sequence_parallel import SequenceGroup, Shard
from ..transformers_seam import PreTrainedModel
from .model_patch import Patch

Model = TypeVar("Model", bound=nn.Module)
"""A ``PreTrainedModel`` or what wraps one: PEFT's, a data-parallel or a compiled one."""


class RoutingRecord:
    """The decisions of one forward over the routed layers (L of them)."""

    def __init__(self, decisions: dict[int, Decision]) -> None:
        self._decisions = [decisions[place] for place in sorted(decisions)]

    @property
    def logits(self) -> Tensor | None:
        """fp32 ``[B, L, 2]`` (head routers ``[B, L, Hkv, 2]``), with its graph; None where the cache had the routes."""
        logits = [d.logits for d in self._decisions if d.logits is not None]
        return torch.stack([x.to(logits[0].device) for x in logits], 1) if logits else None

    @property
    def routes(self) -> Tensor:
        """``[B, L, Hkv]``: int32 (0 full, 1 sparse), or the floating weight of sparse."""
        routes = [d.route for d in self._decisions]
        return torch.stack([r.to(routes[0].device) for r in routes], 1)


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compilation wrappers; PEFT's stays, for it has a forward of its own."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside all wrappers."""
    inner = unwrap_parallel(model)
    base: Any = getattr(inner, "get_base_model", None)
    if not isinstance(inner, PreTrainedModel) and base is not None:
        inner = unwrap_parallel(base())
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(inner).__name__}{_inside(inner)}")
    return inner


def _inside(x: Any) -> str:
    """Where another object, a module around a model or a pipeline, has its model, for a message."""
    parts = x.named_modules() if isinstance(x, nn.Module) else getattr(x, "__dict__", {}).items()
    name = next((name for name, part in parts if isinstance(part, PreTrainedModel)), None)
    return "" if name is None else f": give what it has as .{name}"


def _patch_of(model: nn.Module) -> Patch:
    patch: Patch | None = getattr(_unwrap(model), "_flux_ext", None)
    if patch is None:
        raise ValueError(f"{type(model).__name__} is not patched: call flux_ext.patch(model) first")
    return patch


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`patch` was called on the model, or on what it wraps."""
    return getattr(_unwrap(model), "_flux_ext", None) is not None


def patch(model: Model, config: FluxConfig | None = None, *, routers: FluxRouters | str | Path | None = None) -> Model:
    """Routes a stock transformers causal language model, in place.

    Args:
        model: a ``PreTrainedModel``, or PEFT's wrapper of one, whose layers are rotary attention.
        config: fresh routers that start with everything full; default ``FluxConfig()``.
        routers: trained ones: a :class:`FluxRouters`, a folder or a Hub repository. They bring their own config.

    Returns:
        ``model``. Patching it again with the same settings changes nothing.

    Raises:
        TypeError: ``model`` is no ``PreTrainedModel``.
        ValueError: the model's attention is not supported, the routers belong to another model or are damaged,
            or the model is patched with other settings. The model is then as before.
    """
    inner = _unwrap(model)
    if config is not None and routers is not None:
        raise ValueError("give either config or routers: routers bring their own configuration")
    source = str(routers) if isinstance(routers, (str, Path)) else None
    if is_patched(inner):
        old = _patch_of(inner)
        if routers is not None and routers is not old.routers and (source is None or source != old.source):
            raise ValueError("model is patched with other routers: call flux_ext.unpatch(model) first")
        if routers is None and config is not None and (difference := old.config.differences(config)):
            raise ValueError(f"model is patched with other settings ({difference}): call flux_ext.unpatch first")
        return model
    made: FluxRouters | FluxConfig
    if routers is None:
        made = FluxConfig() if config is None else config
    else:
        made = routers if isinstance(routers, FluxRouters) else FluxRouters.from_pretrained(routers)
    Patch(inner, made).source = source
    return model


def unpatch(model: Model) -> Model:
    """Makes a patched model what it was; returns ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    _patch_of(model).remove()
    return model


@contextlib.contextmanager
def patched(
    model: Model, config: FluxConfig | None = None, *, routers: FluxRouters | str | Path | None = None
) -> Iterator[Model]:
    """:func:`patch` for the length of a ``with`` block; a model that was patched before stays so."""
    before = is_patched(model)
    patch(model, config, routers=routers)
    try:
        yield model
    finally:
        if not before:
            unpatch(model)


def get_routers(model: nn.Module) -> FluxRouters:
    """The routers of a patched model: ``.layers``, ``.config``, ``save_pretrained``.

    Where PEFT trains copies of them (``modules_to_save=["flux_router"]``), these are the active copies.

    Raises:
        ValueError: the model is not patched.
    """
    return _patch_of(model).current_routers()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order, those without a router too.

    Raises:
        ValueError: the model is not patched.
    """
    return list(_patch_of(model).decoder.layers)


def last_routing(model: nn.Module) -> RoutingRecord:
    """The decisions of the model's last forward in this thread.

    Raises:
        ValueError: there was none.
    """
    decisions = _patch_of(model).local.last.decisions
    if not decisions:
        raise ValueError("no forward has run since the model was patched")
    return RoutingRecord(decisions)


@contextlib.contextmanager
def _setting(model: nn.Module, name: str, value: object) -> Iterator[None]:
    """Sets a field of this thread's forwards within a ``with`` block."""
    local = _patch_of(model).local
    before = getattr(local, name)
    setattr(local, name, value)
    try:
        yield
    finally:
        setattr(local, name, before)


def policy(model: nn.Module, fn: Policy) -> contextlib.AbstractContextManager[None]:
    """Lets ``fn(layer, logits)`` decide in place of the routers' argmax, in this thread.

    Args:
        model: a patched model.
        fn: layer is the position among the routed layers; logits fp32 ``[B, 2]`` (head routers
            ``[B, Hkv, 2]``), index 1 arguing for full. Returns the route, ``[B]`` or ``[B, Hkv]``: integers or booleans
            (1 sparse) or floating weights of sparse. Called again when checkpointing recomputes a layer.
    """
    return _setting(model, "policy", fn)


def prompt_lengths(model: nn.Module, lengths: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Lets the routers see only the beginning of each sequence, in this thread: training feeds prompt and answer
    together, and must decide from what there is when an answer is generated.

    Args:
        model: a patched model.
        lengths: integers ``[B]``, tokens of each sequence that are its prompt, padding not counted; None: all.
    """
    return _setting(model, "prompt_lengths", lengths)


def shard(model: nn.Module, part: Shard | None) -> contextlib.AbstractContextManager[None]:
    """Says that the forwards of this thread have a part of their sequences' tokens; other processes have the rest.

    Args:
        model: a patched model, called with its own tokens, their ``position_ids`` and no mask.
        part: which; None: all tokens.
    """
    return _setting(model, "shard", part)


def check_sequence_parallel(model: nn.Module, group: SequenceGroup) -> None:
    """ValueError where sequences of this patched model cannot be spread over the processes of a group."""
    patch = _patch_of(model)
    if (rest := len(patch.decoder.layers) - len(patch.attentions)) > 0:
        raise ValueError(
            f"sequence parallelism needs attention in every layer: {rest} of {len(patch.decoder.layers)} layers of "
            f"{type(patch.model).__name__} carry a state from token to token"
        )
    group.check_heads(patch.num_q_heads, patch.num_kv_heads)


@contextlib.contextmanager
def routes(model: nn.Module, route: str | Tensor, *, everywhere: bool = False) -> Iterator[None]:
    """Forces routes within a ``with`` block, in this thread or in all.

    Threads do not disturb each other: each may force routes of its own, or leave the decision to the routers. So where
    the text is generated by a thread that is started inside the block, as with a ``TextIteratorStreamer``, say
    ``everywhere=True``, or enter the block in that thread; a forward that the routers decide while another thread has a
    block says so in a warning, once for each model (not from inside a compiled model)::

        with flux_ext.routes(model, "sparse", everywhere=True):
            Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
            for text in streamer:
                print(text, end="")

    Args:
        model: a patched model.
        route: ``"full"``, ``"sparse"``, or a tensor ``[L]``, ``[B, L]`` or ``[B, L, Hkv]`` over the routed layers:
            integers or booleans (0 full, 1 sparse), or floating weights of sparse.
        everywhere: also in all other threads, but for those that are inside a block of their own. Of several such
            blocks, the one that was entered last counts. Leave the block when the other threads have read their
            prompts: a prompt that is read later is the routers' to decide.

    Raises:
        TypeError: ``route`` is neither a word nor a tensor.
        ValueError: the model is not patched, or ``route`` is another word, of another shape or not a number.
    """
    num_layers = len(get_routers(model).layers)
    if isinstance(route, str):
        if route not in ("full", "sparse"):
            raise ValueError(f'route must be "full", "sparse" or a tensor, got {route!r}')
        route = torch.full((num_layers,), int(route == "sparse"), dtype=torch.int32)
    if not isinstance(route, Tensor):
        raise TypeError(f'route must be "full", "sparse" or a tensor, got {described(route)}')
    if route.dim() not in (1, 2, 3) or route.shape[min(route.dim() - 1, 1)] != num_layers:
        raise ValueError(
            f"route must be [L], [B, L] or [B, L, Hkv] with L = {num_layers}, got shape {list(route.shape)}"
        )

    if route.is_floating_point() and bool(route.isnan().any()):
        raise ValueError("route must be numbers, it has NaN")

    def forced(layer: int, logits: Tensor) -> Tensor:
        if route.dim() > 1 and route.shape[0] != len(logits):
            raise ValueError(f"route must be [B, ...] with B = {len(logits)} sequences, got shape {list(route.shape)}")
        return route[layer].expand(logits.shape[0]) if route.dim() == 1 else route[:, layer]

    with policy(model, forced), _patch_of(model).forced.opened(forced, everywhere):
        yield


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Full attention everywhere within a ``with`` block, in this thread, whatever the full mode is: the model as it was
    before :func:`patch`, up to rounding.

    Where the full mode is another, prompts that were read in here have caches of their own: a cache is refused on the
    other side.

    Raises:
        ValueError: the model is not patched.
    """
    with _setting(model, "dense", True), routes(model, "full"):
        yield


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """As ``model.eval()`` within a ``with`` block; afterwards each module is in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
