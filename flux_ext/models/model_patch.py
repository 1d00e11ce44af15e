"""All that a patch changes in one model, put in place, proven and undone; and the hooks of its decoder.

What it adds to each attention module is in ``patched_attention.py``, the methods of the model that it replaces are in
``model_methods.py``.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import transformers_seam
from ..caches.dynamic import FluxCache, stock_cache_layers
from ..config import FluxConfig
from ..forward_context import read_forward, read_part
from ..routers.collection import FluxRouters
from ..transformers_seam import DynamicLayer, PreTrainedModel, cache_name, cache_of, take_cache
from . import attention_function, families, proof
from .config_view import Views
from .forced_routes import ForcedRoutes
from .model_methods import HELD_ROUTES, ModelMethods
from .patched_attention import CONTEXT, PatchedAttention, ThreadState

_PATCHES: weakref.WeakSet[Patch] = weakref.WeakSet()
"""All that are in force, to know which routers are in use."""


class Patch:
    """All that was changed in one model, which finds this as its ``_flux_ext``.

    Raises:
        ValueError: the model cannot be patched, or not with these routers; it is then as it was.
        ImportError: transformers lacks what is needed.
    """

    def __init__(self, model: PreTrainedModel, routers: FluxRouters | FluxConfig) -> None:
        transformers_seam.check_installed()
        self.model: Any = model
        self.source: str | None = None  # the folder or repository that the routers are from
        self.decoder: Any = families.decoder_of(model)
        self.text_config = model.config.get_text_config(decoder=True)
        families.refuse_unsupported(model, self.decoder, self.text_config)
        self.local = ThreadState()
        self.forced = ForcedRoutes()
        self.hands_on_keywords = True  # the decoder's layers, to their attention: until a forward shows otherwise
        with proof.refusing(type(model).__name__, "no cache can be made for it"):
            stock = stock_cache_layers(model.config)
        self.num_cache_layers = len(stock)
        # What kind of attention a decoder layer has is told by the cache that transformers makes for it.
        self.full_layers = [i for i, x in enumerate(stock) if type(x) is DynamicLayer]
        windows = {i: x.sliding_window for i, x in enumerate(stock) if getattr(x, "is_sliding", False)}
        kinds = [type(x).__name__ for x in stock]
        if not self.full_layers:
            raise ValueError(
                f"no layer of {type(model).__name__} has full attention: there is nothing to route (sliding windows: "
                f"{sorted(set(windows.values()))}; cache layers: {sorted(set(kinds))})"
            )
        attentions: dict[int, Any] = {
            i: families.attention_of(self.decoder.layers[i], i) for i in sorted({*self.full_layers, *windows})
        }
        self.parameter_order = list(inspect.signature(self.decoder.forward).parameters)
        self.cache_name = cache_name(self.decoder.forward)
        evidence = proof.Proof(model, self.decoder, attentions, self.text_config)
        self.configs = Views(model, self.decoder, self.text_config)
        try:
            views = proof.look(model, self.decoder, attentions, self.text_config, windows, kinds, self.configs.show)
        finally:
            self.configs.hide()
        heads = proof.heads(type(model).__name__, {i: views[i] for i in self.full_layers}, self.text_config)
        self.num_q_heads, self.num_kv_heads, self.head_dim = heads
        self.config = self._fill(routers if isinstance(routers, FluxConfig) else routers.config)
        self.dense_config = dataclasses.replace(self.config, full="full")
        taps = self._find_taps(attentions, views)
        if isinstance(routers, FluxConfig):
            with torch.inference_mode(False):  # they are to be trained one day
                routers = FluxRouters(self.config)
        self.routers = routers
        self._install(attentions, windows, taps, evidence)
        routers.config = self.config

    def _find_taps(self, attentions: dict[int, nn.Module], views: dict[int, proof.View]) -> dict[int, families.Tap]:
        """Where each router will see its queries or keys, by layer."""
        heads = self.num_q_heads, self.num_kv_heads, self.head_dim
        kind = "query" if self.config.granularity == "layer" else "key"
        return {
            i: families.find_tap(kind, attentions[i], getattr(views[i], kind), heads, views[i].outputs)
            for i in self.config.routed_layers()
        }

    def _fill(self, config: FluxConfig) -> FluxConfig:
        """The configuration with the model's own numbers; ValueError where it is one of another model."""
        own: dict[str, Any] = {
            "num_layers": len(self.decoder.layers),
            "head_dim": self.head_dim,
            "num_kv_heads": self.num_kv_heads,
            "model_type": self.text_config.model_type,
        }
        for name, value in own.items():
            if (given := getattr(config, name)) not in (None, value):
                raise ValueError(f"the routers were made for another model: {name} is {given!r}, here {value!r}")
        if config.layers_to_route is not None and not set(config.layers_to_route) <= set(self.full_layers):
            raise ValueError(
                f"layers_to_route must be among the layers with full attention, {self.full_layers}, "
                f"got {config.layers_to_route}"
            )
        return dataclasses.replace(
            config,
            **own,
            layers_to_route=config.layers_to_route or self.full_layers,
            base_model_name_or_path=config.base_model_name_or_path or self.model.name_or_path or None,
        )

    def _install(
        self,
        attentions: dict[int, nn.Module],
        windows: dict[int, int],
        taps: dict[int, families.Tap],
        evidence: proof.Proof,
    ) -> None:
        """Changes the model, and proves that it is what it was; undoes everything where it is not."""
        routed = self.config.routed_layers()
        self.methods = ModelMethods(self)
        attention_function.register()
        self.configs.show(attention_function.NAME)
        self.attentions: list[PatchedAttention] = []
        self.handles = [
            self.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self.after_decoder, with_kwargs=True, always_call=True),
        ]
        self.model._flux_ext = self
        try:
            for i, attention in attentions.items():
                place = routed.index(i) if i in routed else None
                self.attentions.append(PatchedAttention(self, i, attention, place, windows.get(i), taps.get(i)))
                if place is not None:
                    attention.flux_router = self.routers.layers[place]
            self._place_routers()
            self.methods.install()
            self._prove(evidence)
        except BaseException:
            self.remove()
            raise
        _PATCHES.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one from a pickle, is in force too."""
        self.__dict__.update(state)
        _PATCHES.add(self)

    def _place_routers(self) -> None:
        """Each router on its attention's device; ValueError where another model uses it elsewhere."""
        placed: list[tuple[Any, torch.device]] = [
            (x.attention.flux_router, families.device_of(x.attention, self.model)) for _, x in self.routed_attentions()
        ]
        moved = [(router, device) for router, device in placed if not families.is_on(router, device)]
        if moved and self._others_use(self.routers):
            router, device = moved[0]
            raise ValueError(
                f"these routers are part of another patched model, on {next(router.parameters()).device}, and this one "
                f"is on {device}: give each a copy of its own, routers=copy.deepcopy(routers)"
            )
        for router, device in moved:
            router.to(device)

    def _others_use(self, routers: FluxRouters) -> bool:
        """Whether the routers are part of another patched model too."""

        def used() -> bool:
            return any(patch is not self and patch.routers is routers for patch in _PATCHES)

        if used():
            gc.collect()  # models refer to themselves, so one that nobody uses any more may still be there
        return used()

    def routed_attentions(self) -> list[tuple[int, PatchedAttention]]:
        """Those that have a router, each with its place among them."""
        return [(x.place, x) for x in self.attentions if x.place is not None]

    def current_routers(self) -> FluxRouters:
        """The routers; where PEFT trains copies of them, the active copies."""
        for place, patched in self.routed_attentions():
            router: Any = patched.attention.flux_router
            copies = getattr(router, "modules_to_save", None)
            self.routers.layers[place] = router if copies is None else copies[router.active_adapters[0]]
        return self.routers

    def _prove(self, evidence: proof.Proof) -> None:
        """With every route full, and full attention in the full mode, the patched model is the model it was."""
        local = self.local
        local.policy = lambda place, logits: torch.zeros(len(logits), dtype=torch.int32)
        local.dense = True
        try:
            evidence.compare(self.new_cache(), self.cache_name)
        finally:
            local.policy = local.last.decisions = None
            local.dense = False

    def remove(self) -> None:
        """Undoes everything."""
        for handle in self.handles:
            handle.remove()
        _PATCHES.discard(self)
        for patched in self.attentions:
            patched.remove()
            if "flux_router" in patched.attention._modules:
                del patched.attention.flux_router
        self.methods.remove()
        self.configs.hide()
        del self.model._flux_ext

    def before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder: makes the context of this forward and, where one is wanted, the cache."""
        kwargs = {**dict(zip(self.parameter_order, args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if kwargs.get("output_attentions") or self.text_config.output_attentions:
            raise ValueError("output_attentions=True: a patched model computes no attention weights to give back")
        cache = take_cache(kwargs)
        self.check_cache(cache)
        if cache is not None:
            cache.check_batch(tokens.shape[0])
        self.check_checkpointing()
        policy = self.local.policy
        if policy is None:
            policy = self.forced.everywhere()
        if self.local.shard is None:
            context = read_forward(policy, kwargs, tokens, cache)
        else:
            context = read_part(policy, kwargs, tokens, cache, self.local.shard)
        if cache is not None:
            cache.check_mask(context, *tokens.shape[:2])
        context.dense = self.local.dense
        context.prompt_lengths = self.local.prompt_lengths
        context.held = kwargs.pop(HELD_ROUTES, None)
        if context.held is not None:
            if context.held.prompt_len is None:
                context.held.prompt_len = tokens.shape[1]
            context.prompt_len = context.held.prompt_len
        if cache is not None:
            context.prompt_len, cache.prompt_len = cache.prompt_len, None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if context.cu_seqlens is not None:
                if use_cache:
                    raise ValueError("several sequences packed into one row have no cache: pass use_cache=False")
                use_cache = False
            if use_cache is None:
                use_cache = self.text_config.use_cache and not module.training
            kwargs["use_cache"] = use_cache
            if use_cache:
                cache = self.new_cache()
        if cache is not None:
            cache.unfinished = True
        kwargs[self.cache_name] = cache
        kwargs[CONTEXT] = context
        self.local.forward, self.local.last.decisions = context, context.decisions
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder: stores the last layer's prompt.

        A forward that failed leaves no decisions, and a cache that may be of no use.
        """
        local = self.local
        context: Any = kwargs.get(CONTEXT)  # not local.forward: a forward within this one has had another there
        local.forward = local.last.decisions = None
        if output is None:
            if context is not None:
                context.unstored.left = None
            return
        context.store_prompt()
        local.last.decisions = context.decisions
        if (cache := cache_of(kwargs)) is not None:
            cache.unfinished = False

    @property
    def settings(self) -> FluxConfig:
        """What this thread's forwards attend by, and caches are made for: the configuration, but that the full mode of
        dense ones is full attention."""
        return self.dense_config if self.local.dense else self.config

    def new_cache(self) -> FluxCache:
        """An empty cache for this model."""
        return FluxCache(self.model.config, self.settings)

    def check_cache(self, cache: Any) -> None:
        """TypeError or ValueError where a cache is of another kind, or made for other settings or another model."""
        if cache is None:
            return
        if not isinstance(cache, FluxCache):
            raise TypeError(f"a patched model needs a flux_ext.FluxCache as its cache, got {type(cache).__name__}")
        settings = self.settings
        if cache.flux is settings or torch.compiler.is_compiling():
            return
        difference = settings.differences(cache.flux)
        if len(cache.layers) != self.num_cache_layers:
            difference = f"layers: {self.num_cache_layers} and {len(cache.layers)}"
        if difference:
            raise ValueError(
                f"the cache was made for other settings than this model's ({difference}): give it model.config and "
                "flux_ext.get_routers(model).config"
            )
        cache.flux = settings  # of a copy, say: known from now on

    def check_checkpointing(self) -> None:
        """Reentrant checkpointing runs the forward without a graph, so routers would silently get no gradient."""
        if not (self.decoder.training and torch.is_grad_enabled()):
            return
        if transformers_seam.reentrant_checkpointing(self.decoder):
            raise ValueError('gradient checkpointing must be non-reentrant: {"use_reentrant": False}')
        if not self.hands_on_keywords and transformers_seam.checkpointing(self.decoder):
            raise ValueError(
                f"{type(self.decoder.layers[0]).__name__} does not hand keywords on to its attention: a patched "
                f"{type(self.model).__name__} cannot train with gradient checkpointing: leave it off (flux-ext train: "
                "--no-gradient-checkpointing), or train by counterfactuals, which need none"
            )

    def check_route(self, route: Tensor, logits: Tensor) -> Tensor:
        """A policy's answer as ``[B, Hkv]``, int32 or floating."""
        if not isinstance(route, Tensor):
            raise TypeError(f"a route must be a tensor, got {type(route).__name__}")
        if route.is_complex():
            raise ValueError(f"a route must be integers, booleans or floating numbers, got {route.dtype}")
        batch_size = logits.shape[0]
        if tuple(route.shape) not in ((batch_size,), (batch_size, self.num_kv_heads)):
            raise ValueError(
                f"a route must be [{batch_size}] or [{batch_size}, {self.num_kv_heads}], got {list(route.shape)}"
            )
        route = route.to(logits.device)
        if not route.is_floating_point() and route.dtype != torch.int32:
            route = route.long().clamp(-1, 2).to(torch.int32)  # what is neither 0 nor 1 stays so
        return route if route.dim() == 2 else route[:, None].expand(-1, self.num_kv_heads)
