"""All that a patch changes in one model: hooks, taps, attention implementation; and how to undo it."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import transformers_seam
from ..caches.dynamic import FluxCache, FluxLayer, stock_layers
from ..caches.static import FluxStaticCache
from ..config import FluxConfig
from ..forward_context import Decision, ForwardContext, Policy, read_forward
from ..operators import decide
from ..routers.collection import FluxRouters
from ..transformers_seam import CACHE, DynamicLayer, PreTrainedModel, cache_name, cache_of, take_cache
from . import attention_function, families, proof
from .config_view import Views

BATCH = "flux_ext_batch"
"""The keyword with which the decoder hands a :class:`ForwardContext` through its layers, also when recomputed."""

HELD = "flux_ext_routes"
"""The keyword with which ``generate`` hands the prompt's routes from forward to forward where no cache keeps them."""


REPLACEMENTS = {
    "_prepare_cache_for_generation": "prepare_cache",
    "_get_candidate_generator": "candidate_generator",
    "generate_batch": "refuse_continuous_batching",
    "init_continuous_batching": "refuse_continuous_batching",
    "continuous_batching_context_manager": "refuse_continuous_batching",
}
"""Methods of the model that a patch replaces, all that ``transformers_seam.REPLACED`` names, by methods of Patch."""

_PATCHES: weakref.WeakSet[Patch] = weakref.WeakSet()
"""All that are in force, to know which routers are in use."""


class _Local(threading.local):
    """State of the forward in flight in this thread; copies start empty."""

    # Set in every thread, not by the class: torch 2.11 compiles what the class says instead of what the thread has.
    def __init__(self) -> None:
        self.forward: Any = None  # ForwardContext of the decoder's forward
        self.batch: Any = None  # the same in an attention module, on its device
        self.cache: FluxLayer | None = None
        self.policy: Policy | None = None
        self.prompt_lengths: Tensor | None = None
        self.decisions: dict[int, Decision] | None = None

    def __deepcopy__(self, memo: Any) -> _Local:
        return _Local()

    def __reduce__(self) -> Any:
        return _Local, ()


class PatchedLayer:
    """One attention module: its place, its tap and its hooks.

    ``slot`` is the position among the routed layers, None for a layer without a router; ``window`` the layer's own
    sliding window, if it has one.
    """

    def __init__(
        self,
        patch: Patch,
        index: int,
        attention: nn.Module,
        slot: int | None,
        window: int | None,
        tap: families.Tap | None,
    ) -> None:
        self.patch, self.index, self.attention, self.slot, self.window = patch, index, attention, slot, window
        self.pattern = patch.config.sparse_pattern()
        self.tap = tap
        self.tapped: nn.Module | None = None
        self.tap_handle: Any = None
        self.handles = [
            attention.register_forward_pre_hook(self.before, with_kwargs=True),
            attention.register_forward_hook(self.after, always_call=True),
        ]
        attention._flux_ext = self  # type: ignore[assignment]
        if tap is not None:
            self.attach_tap()

    def remove(self) -> None:
        for handle in (*self.handles, self.tap_handle):
            if handle is not None:
                handle.remove()
        del self.attention._flux_ext

    def current(self) -> tuple[ForwardContext, FluxLayer | None, Tensor | None]:
        """ForwardContext, cache layer and route of the forward in flight; called by the attention function."""
        local = self.patch.local
        route = None
        if self.slot is not None:
            if self.slot not in local.batch.decisions:
                raise RuntimeError(f"layer {self.index}: the router did not see its states")
            route = local.batch.decisions[self.slot].route
        return local.batch, local.cache, route

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the attention module: finds this forward's batch and cache layer."""
        local = self.patch.local
        batch = kwargs.pop(BATCH, None)
        if batch is None:
            if local.forward is None:
                raise RuntimeError("the layers of a patched model run only inside its decoder's forward")
            self.patch.hands_on_keywords = False
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            batch = local.forward.to(hidden.device)
        cache = cache_of(kwargs)
        layer = None if cache is None else cache.layers[self.index]
        local.batch, local.cache = batch, None
        if isinstance(layer, FluxLayer):
            layer.begin(batch)
            if self.slot is None and layer.route is None:
                h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                layer.set_route(h.new_zeros((h.shape[0], self.patch.num_kv_heads), dtype=torch.int32))
            local.cache = layer
        if self.tap is not None and getattr(module, self.tap.name) is not self.tapped:
            self.attach_tap()  # the submodule was replaced, by a LoRA adapter for one
        return args, kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the attention module, also after an error in it: lets go of the cache."""
        self.patch.local.batch = self.patch.local.cache = None

    def attach_tap(self) -> None:
        """Hooks the submodule that makes the states the router sees."""
        if self.tap_handle is not None:
            self.tap_handle.remove()
        assert self.tap is not None
        self.tapped = getattr(self.attention, self.tap.name)
        self.tap_handle = self.tapped.register_forward_hook(self.after_tap)

    def after_tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Queries (or keys) are made: the router decides, if no earlier forward did."""
        local = self.patch.local
        batch, cache = local.batch, local.cache
        assert self.slot is not None and self.tap is not None
        if batch is None:
            return  # called from outside the attention module
        if cache is not None and cache.route is not None and not cache.waiting:
            batch.decisions[self.slot] = Decision(None, cache.route)
            return
        if batch.held is not None and self.slot in batch.held:
            batch.decisions[self.slot] = Decision(None, batch.held[self.slot])
            return
        x = self.tap.states(output, self.attention)
        seq_start, seq_end = batch.seq_start, batch.seq_end
        if batch.cu_seqlens is not None:
            x, seq_start, seq_end = x[0], batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
        if batch.prompt_lengths is not None:  # answers follow the prompts
            lengths = batch.prompt_lengths.to(x.device, torch.int32)
            seq_start = torch.zeros_like(lengths) if seq_start is None else seq_start
            seq_end = seq_start + lengths
        if batch.prompt_len is not None and batch.prompt_len < x.shape[1]:  # candidates follow the prompt
            x = x[:, : batch.prompt_len]
            seq_end = None if seq_end is None else seq_end.clamp(max=batch.prompt_len)
        router: Any = self.attention.flux_router
        logits = router(x, seq_start, seq_end)
        route = decide(logits) if batch.policy is None else batch.policy(self.slot, logits)
        route = self.patch.check_route(route, logits)
        if cache is not None:
            if route.is_floating_point():
                raise ValueError("a fractional route has no cache: call the model with use_cache=False")
            route = cache.set_route(route)
        if batch.held is not None:
            batch.held[self.slot] = route
        batch.decisions[self.slot] = Decision(logits, route)


class Patch:
    """All that was changed in one model."""

    def __init__(self, model: PreTrainedModel, routers: FluxRouters | FluxConfig) -> None:
        transformers_seam.check_installed()
        self.model: Any = model
        self.source: str | None = None  # the folder or repository that the routers are from
        self.decoder: Any = families.decoder_of(model)
        self.text_config = model.config.get_text_config(decoder=True)
        families.refuse_unsupported(model, self.decoder, self.text_config)
        self.local = _Local()
        self.hands_on_keywords = True  # the layers, to their attention; the proof sees it
        with proof.refusing(type(model).__name__, "no cache can be made for it"):
            stock = stock_layers(model.config)
        self.full_layers = [i for i, layer in enumerate(stock) if type(layer) is DynamicLayer]
        windows = {i: layer.sliding_window for i, layer in enumerate(stock) if getattr(layer, "is_sliding", False)}
        kinds = [type(layer).__name__ for layer in stock]
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
        taps = self._find_taps(attentions, views)
        if isinstance(routers, FluxConfig):
            with torch.inference_mode(False):  # they are to be trained one day
                routers = FluxRouters(self.config)
        self.routers = routers
        self._install(attentions, windows, taps, evidence)
        routers.config = self.config

    def _find_taps(self, attentions: dict[int, nn.Module], views: dict[int, proof.View]) -> dict[int, families.Tap]:
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
        routed, model = self.config.routed_layers(), self.model
        replaced = transformers_seam.replaceable(model)
        attention_function.register()
        self.configs.show(attention_function.NAME)
        self.layers = []
        self.handles = [
            self.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self.after_decoder, always_call=True),
        ]
        self.ignored_on_save = model._keys_to_ignore_on_save
        self.shadowed: list[str] = []
        model._flux_ext = self  # type: ignore[assignment]
        try:
            for i, attention in attentions.items():
                slot = routed.index(i) if i in routed else None
                self.layers.append(PatchedLayer(self, i, attention, slot, windows.get(i), taps.get(i)))
                if slot is not None:
                    attention.flux_router = self.routers.layers[slot]
            self._place_routers()
            self._keep_out_of(model.state_dict())
            for name in replaced:
                self._shadow(name, getattr(self, REPLACEMENTS[name]))
            self._shadow("set_attn_implementation", self.refuse_attn_implementation)
            self._shadow("save_pretrained", self.save_pretrained)
            self._shadow("create_masks_for_generate", self.masks_for_generate)
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
            (x.attention.flux_router, families.device_of(x.attention, self.model)) for _, x in self.routed_layers()
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
        def used() -> bool:
            return any(patch is not self and patch.routers is routers for patch in _PATCHES)

        if used():
            gc.collect()  # a model that is no longer in use lives until then
        return used()

    def routed_layers(self) -> list[tuple[int, PatchedLayer]]:
        """The layers that have a router, with their place among them."""
        return [(layer.slot, layer) for layer in self.layers if layer.slot is not None]

    def current_routers(self) -> FluxRouters:
        """The routers; where PEFT trains copies of them, the active copies."""
        for slot, layer in self.routed_layers():
            router: Any = layer.attention.flux_router
            copies = getattr(router, "modules_to_save", None)
            self.routers.layers[slot] = router if copies is None else copies[router.active_adapters[0]]
        return self.routers

    def _prove(self, evidence: proof.Proof) -> None:
        """With every route full the patched model is the model it was."""
        local = self.local
        local.policy = lambda slot, logits: torch.zeros(len(logits), dtype=torch.int32)
        try:
            evidence.compare(self.new_cache(), self.cache_name)
        finally:
            local.policy = local.decisions = None

    def _shadow(self, name: str, method: Any) -> None:
        """Replaces a method of this one instance."""
        setattr(self.model, name, method)
        self.shadowed.append(name)

    def remove(self) -> None:
        """Undoes everything."""
        for handle in self.handles:
            handle.remove()
        _PATCHES.discard(self)
        for layer in self.layers:
            layer.remove()
            if "flux_router" in layer.attention._modules:
                del layer.attention.flux_router
        for name in self.shadowed:
            self.model.__dict__.pop(name, None)
        self.model._keys_to_ignore_on_save = self.ignored_on_save
        self.configs.hide()
        del self.model._flux_ext

    def before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder: the cache and the batch of this forward."""
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
        batch = read_forward(self.local.policy, kwargs, tokens, cache)
        batch.prompt_lengths = self.local.prompt_lengths
        batch.held = kwargs.pop(HELD, None)
        if cache is not None:
            batch.prompt_len, cache.prompt_len = cache.prompt_len, None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if batch.cu_seqlens is not None:
                if use_cache:
                    raise ValueError("several sequences packed into one row have no cache: pass use_cache=False")
                use_cache = False
            if use_cache is None:
                use_cache = self.text_config.use_cache and not module.training
            kwargs["use_cache"] = use_cache
            if use_cache:
                cache = self.new_cache()
        kwargs[self.cache_name] = cache
        kwargs[BATCH] = batch
        self.local.forward, self.local.decisions = batch, batch.decisions
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the decoder: a forward that failed leaves no decisions."""
        self.local.forward = None
        if output is None:
            self.local.decisions = None

    def new_cache(self) -> FluxCache:
        """An empty cache for this model."""
        return FluxCache(self.model.config, self.config)

    def check_cache(self, cache: Any) -> None:
        if cache is not None and not isinstance(cache, FluxCache):
            raise TypeError(f"a patched model needs a flux_ext.FluxCache as its cache, got {type(cache).__name__}")

    def check_checkpointing(self) -> None:
        """Reentrant checkpointing runs the forward without a graph, so routers would silently get no gradient."""
        if not (self.decoder.training and torch.is_grad_enabled()):
            return
        if transformers_seam.reentrant_checkpointing(self.decoder):
            raise ValueError('gradient checkpointing must be non-reentrant: {"use_reentrant": False}')
        if not self.hands_on_keywords and transformers_seam.checkpointing(self.decoder):
            raise ValueError(
                f"{type(self.decoder.layers[0]).__name__} does not hand keywords on to its attention: a patched "
                f"{type(self.model).__name__} cannot train with gradient checkpointing"
            )

    def check_route(self, route: Tensor, logits: Tensor) -> Tensor:
        """A policy's answer as ``[B, Hkv]``, int32 or floating."""
        batch_size = logits.shape[0]
        if tuple(route.shape) not in ((batch_size,), (batch_size, self.num_kv_heads)):
            raise ValueError(
                f"a route must be [{batch_size}] or [{batch_size}, {self.num_kv_heads}], got {list(route.shape)}"
            )
        route = route.to(logits.device)
        if not route.is_floating_point():
            route = route.to(torch.int32)
        return route if route.dim() == 2 else route[:, None].expand(-1, self.num_kv_heads)

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """In place of the model's ``_prepare_cache_for_generation``: a FluxCache where it would make a dynamic one."""
        if generation_config.prefill_chunk_size is not None and self.config.route_on == "prompt":
            raise ValueError(
                'prefill_chunk_size splits the prompt, but FluxConfig(route_on="prompt") decides from all of it; '
                'patch with route_on="first_chunk"'
            )
        cache = cache_of(model_kwargs)
        self.check_cache(cache)
        if cache is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not supported by a "
                    "patched model; leave it out, or pass a flux_ext.FluxCache"
                )
            if generation_config.cache_implementation == "static":
                call = transformers_seam.arguments_of(
                    self.model, "_prepare_cache_for_generation", generation_config, model_kwargs, *args, **kwargs
                )
                cache = FluxStaticCache(self.model.config, self.config, call["max_cache_length"])
            else:
                cache = self.new_cache()
            model_kwargs[CACHE] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()
        else:
            if cache is None:  # every forward has the prompt and the answer so far: the first one decides
                model_kwargs[HELD] = {}
            type(self.model)._prepare_cache_for_generation(self.model, generation_config, model_kwargs, *args, **kwargs)

    def candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``_get_candidate_generator``: the first forward will have candidates after the prompt."""
        if self.config.pattern == "triangle":
            raise ValueError('assisted decoding needs pattern="streaming": a triangle ends with the prompt')
        call = transformers_seam.arguments_of(self.model, "_get_candidate_generator", *args, **kwargs)
        cache = cache_of(call["model_kwargs"])
        if cache.get_seq_length() == 0:
            cache.prompt_len = call["input_ids"].shape[1]
        return type(self.model)._get_candidate_generator(self.model, *args, **kwargs)

    def refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("continuous batching (generate_batch) does not work on a patched model: use generate")

    def refuse_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"attn_implementation of a patched model must stay {attention_function.NAME!r}, not become "
            f"{attn_implementation!r}: call flux_ext.unpatch(model) to use another"
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """In place of the model's: the plain model, and the routers beside it under names of their own.

        Raises:
            ValueError: the routers cannot be saved there, see :meth:`FluxRouters.save_pretrained`; nothing was written.
        """
        stock = type(self.model).save_pretrained
        call = inspect.signature(stock).bind(self.model, save_directory, *args, **kwargs).arguments
        routers = self.current_routers()
        routers.check_savable(save_directory)
        push = call.pop("push_to_hub", False)
        more = call.pop("kwargs", {})
        given = call.get("state_dict")
        self._keep_out_of(self.model.state_dict() if given is None else given)
        stock(**call, **({} if push else more))
        if call.get("is_main_process", True):
            routers.save_pretrained(save_directory)
        if push:  # from a temporary folder, with the routers
            repo_id = more.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.model.push_to_hub(repo_id, token=call.get("token"), **more)

    def _keep_out_of(self, state_dict: dict[str, Any]) -> None:
        """Tells ``save_pretrained`` to leave the routers out, whatever took the place of their layers."""
        own = {key for key in state_dict if ".flux_router." in key}
        self.model._keys_to_ignore_on_save = {*(self.ignored_on_save or ()), *own}

    def masks_for_generate(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's, or transformers', ``create_masks_for_generate``: masks as this model's modules take
        them, though ``generate`` hands over ``model.config``."""
        return transformers_seam.masks_for_generate(self.model)(self.configs.of(config), *args, **kwargs)
