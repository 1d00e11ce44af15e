"""What a patch adds to one attention module: hooks, and the tap through which its router sees queries or keys."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..caches.layer import FluxCacheLayer
from ..forward_context import Decision, ForwardContext, Policy
from ..operators import Routing
from ..operators.patterns import Full
from ..sequence_parallel import Shard
from ..transformers_seam import cache_of
from . import families
from .attention_function import FLOATS, check_dtype

if TYPE_CHECKING:
    from .model_patch import Patch

CONTEXT = "flux_ext_context"
"""The keyword with which the decoder hands its :class:`ForwardContext` through its layers. As an argument of theirs it
is there again when checkpointing recomputes a layer, after the forward."""

DENSE = Full()


class LastForward:
    """The decisions of the last forward, by place among the routed layers. An object of its own: a compiled forward
    leaves what it writes to one, and loses what it writes to a ``threading.local``."""

    decisions: dict[int, Decision] | None = None


class ThreadState(threading.local):
    """What the hooks of one forward leave for each other, by thread; copies start empty.

    Attributes:
        forward: context of the decoder's forward in flight.
        context: the same, on its device, while an attention module runs.
        cache_layer: what that module's keys and values are cached in, where we made it.
        decision: its router's, from then on until the module has run. The context keeps the forward's: the one that is
            made again when checkpointing recomputes the layer would hold on to what was recomputed for it.
        policy, prompt_lengths, shard: what callers have set for the forwards of this thread.
        last: what is known of the last forward.
        dense: whether the full mode is full attention whatever the configuration says, to be compared with the model as
            it was.
    """

    # Set here, once in every thread, and not as attributes of the class: torch 2.11 compiles the class's values in,
    # whatever the thread has set.
    def __init__(self) -> None:
        self.forward: Any = None
        self.context: Any = None
        self.cache_layer: FluxCacheLayer | None = None
        self.decision: Decision | None = None
        self.policy: Policy | None = None
        self.prompt_lengths: Tensor | None = None
        self.shard: Shard | None = None
        self.last = LastForward()
        self.dense = False

    def __deepcopy__(self, memo: Any) -> ThreadState:
        return ThreadState()

    def __reduce__(self) -> Any:
        return ThreadState, ()


class PatchedAttention:
    """One patched attention module, which finds this as its ``_flux_ext``.

    Args:
        patch: of the whole model.
        index: the decoder layer that the module is in.
        attention: the module.
        place: its place among the routed layers; None: it has no router.
        window: its own sliding window; None: it has none.
        tap: where its router sees queries or keys; None: it has no router.
    """

    def __init__(
        self,
        patch: Patch,
        index: int,
        attention: nn.Module,
        place: int | None,
        window: int | None,
        tap: families.Tap | None,
    ) -> None:
        self.patch, self.index, self.attention, self.place, self.window = patch, index, attention, place, window
        self.full, self.sparse = patch.config.full_pattern(), patch.config.sparse_pattern()
        self.decode = patch.config.decode_pattern()
        self.tap = tap
        self.tapped: nn.Module | None = None  # the submodule that is hooked
        self.tap_handle: Any = None
        self.handles = [
            attention.register_forward_pre_hook(self.before, with_kwargs=True),
            attention.register_forward_hook(self.after, always_call=True),
        ]
        attention._flux_ext = self  # type: ignore[assignment]
        if tap is not None:
            self.attach_tap()

    def remove(self) -> None:
        """Undoes all this."""
        for handle in (*self.handles, self.tap_handle):
            if handle is not None:
                handle.remove()
        del self.attention._flux_ext

    def current(self) -> tuple[ForwardContext, FluxCacheLayer | None, Tensor | None]:
        """Context, cache layer and route of the forward in flight; called by the attention function."""
        state = self.patch.local
        route = None
        if self.place is not None:
            if state.decision is None:
                raise RuntimeError(f"layer {self.index}: the router did not see its states")
            route = state.decision.route
        return state.context, state.cache_layer, route

    def routings(self, route: Tensor | None, context: ForwardContext) -> tuple[Routing, Routing]:
        """How a prompt attends, and what follows it. A layer without a router attends to everything."""
        if self.place is None:
            dense = Routing(None, DENSE, DENSE)
            return dense, dense
        full = DENSE if context.dense else self.full
        return Routing(route, full, self.sparse), Routing(route, DENSE, self.decode)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the attention module: finds the context and the cache layer."""
        state = self.patch.local
        context = kwargs.pop(CONTEXT, None)
        if context is None:
            if state.forward is None:
                raise RuntimeError("the layers of a patched model run only inside its decoder's forward")
            self.patch.hands_on_keywords = False
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            context = state.forward.to(hidden.device)
        if context.unstored.left is not None:
            context.store_prompt()
        cache = cache_of(kwargs)
        cache_layer = None if cache is None else cache.layers[self.index]
        state.context, state.cache_layer = context, None
        if isinstance(cache_layer, FluxCacheLayer):
            cache_layer.begin(context)
            if self.place is None and cache_layer.route is None:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                all_full = hidden.new_zeros((hidden.shape[0], self.patch.num_kv_heads), dtype=torch.int32)
                cache_layer.set_route(all_full)
            state.cache_layer = cache_layer
        if self.tap is not None and getattr(module, self.tap.name) is not self.tapped:
            self.attach_tap()  # the submodule was replaced, by a LoRA adapter for one
        return args, kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the attention module, also after an error in it (then without an output): lets go of the cache."""
        state = self.patch.local
        context, cache_layer = state.context, state.cache_layer
        state.context, state.cache_layer, state.decision = None, None, None
        if cache_layer is not None and (prompt := cache_layer.end(finished=output is not None)) is not None:
            context.unstored.left = cache_layer, prompt

    def attach_tap(self) -> None:
        """Hooks the submodule that makes the states the router sees."""
        if self.tap_handle is not None:
            self.tap_handle.remove()
        assert self.tap is not None
        self.tapped = getattr(self.attention, self.tap.name)
        self.tap_handle = self.tapped.register_forward_hook(self.after_tap)

    def after_tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Queries (or keys) are made: the router decides, if no earlier forward did."""
        state = self.patch.local
        context, cache_layer = state.context, state.cache_layer
        assert self.place is not None and self.tap is not None
        if context is None:
            return  # called from outside the attention module
        if cache_layer is not None and cache_layer.route is not None and not cache_layer.waiting:
            self._decided(Decision(None, cache_layer.route))
            return
        if context.held is not None and self.place in context.held.routes:
            self._decided(Decision(None, context.held.routes[self.place]))
            return
        check_dtype(output, FLOATS)
        router: Any = self.attention.flux_router
        states = context.prompts(self.tap.states(output, self.attention), self.patch.config.pool_size)
        logits, route = router(*states, with_route=True)
        if context.policy is not None:
            route = context.policy(self.place, logits)
        elif self.place == 0 and not torch.compiler.is_compiling():
            self.patch.forced.warn_of_others()
        route = self.patch.check_route(route, logits)
        if cache_layer is not None:
            if route.is_floating_point():
                raise ValueError(
                    "a route of weights (floating numbers) has no cache: call the model with use_cache=False, or give "
                    "integers or booleans"
                )
            route = cache_layer.set_route(route)
        if context.held is not None:
            context.held.routes[self.place] = route
        self._decided(Decision(logits, route))

    def _decided(self, decision: Decision) -> None:
        """Notes the decision for the attention function, and for the forward unless it was made before."""
        state = self.patch.local
        state.decision = decision
        state.context.decisions.setdefault(self.place, decision)
