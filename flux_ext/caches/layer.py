"""A layer of the key-value cache of a patched model: what is routed sparse drops the tokens that no later query sees.

Routes are kept per sequence head, i.e. one KV head of one sequence. A sparse one stores its first tokens and its last
ones; ``dropped`` tokens between them, the gap, are gone. The kernels know of no gap: they are given what is stored, as
if it were all there ever was, and the sparse pattern. That is exact. Stored token ``j'`` was token ``j = j'`` of the
sequence before the gap and ``j = j' + dropped`` behind it, and a query at position ``p`` is taken for one at
``p' = p - dropped``, because queries are aligned to the end of the keys. Then the pattern shows the same tokens:

- The sink. ``j' < sink`` holds for the same tokens as ``j < sink``, because the gap begins behind the sink.
- The window. ``dropped`` is a multiple of ``align``, so :meth:`~flux_ext.Streaming.window_begin` of ``p'`` is that of
  ``p`` minus ``dropped``: of the tokens behind the gap the same ones are inside.
- What is stored between the sink and the gap (the rest of a page) stays invisible: the gap ends no later than the
  window of the next query begins, and windows only move on.

So one call of attention serves any mix of routes.

Only tokens are stored, never padding: a mask says which of a forward's slots are tokens, and what it takes back of
earlier ones is removed (:mod:`flux_ext.caches.history`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import operators
from ..config import FluxConfig
from ..forward_context import ForwardContext
from ..operators import KeyValues, Routing
from ..operators.patterns import Full
from ..transformers_seam import CacheLayerMixin
from . import steps
from .history import FAILED, History, Step
from .host_copy import HostCopy
from .layout import PageLayout
from .pages import PagedKeyValues, normal


class FluxCacheLayer(CacheLayerMixin):
    """The keys and values of one decoder layer with full attention; each sequence head is routed full or sparse.

    What a sparse one can drop after a forward is dropped at the start of the next update, so that the last forward's
    tokens can still be cropped.

    One forward calls, in this order: :meth:`begin` (the patch), :meth:`set_route` (the router), :meth:`update` (the
    model), :meth:`attend` or, for a prompt, :meth:`prompt_attended` (the attention function), :meth:`end` (the patch),
    and, for a prompt, :meth:`store_prompt` (the patch, when the next attention module begins).

    Args:
        config: the two modes.
        page_size: tokens per page.
        routed: whether a router decides; otherwise everything is full.
    """

    cache_name = "FluxCache"
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: FluxConfig, page_size: int, routed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout = PageLayout(config.streaming(), page_size)
        self.drops = config.drops_keys()
        self.decode = Full(), config.decode_pattern()  # what full and sparse routes see after the prompt
        # The same in later chunks of a prompt; None: as after the prompt.
        chunks = routed and config.route_on == "first_chunk"
        self.chunk = (config.full_pattern(), config.sparse_pattern()) if chunks else None
        self.page_size, self.routed = page_size, routed
        self.record_past = False  # whether nothing is dropped before crop()
        self.history = History()  # of a whole cache, one for all layers
        self.handle = steps.new_handle(self)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0  # tokens seen, padding included: positions count from it
        self.route: Tensor | None = None  # int32 [B, Hkv]
        self.continues = False  # whether the forward in flight adds to tokens already here
        self.waiting = False  # whether a sequence had only padding so far
        self.undecided: Tensor | None = None  # bool [B, Hkv], which sequences those are
        self._context: ForwardContext | None = None
        self._prompt: tuple[Tensor, Tensor, Tensor] | None = None  # what update() got, and the route
        self._host_route: HostCopy | None = None  # of that route
        self._attended = False  # whether attention over that prompt was called
        self._until_trim = 0  # so many more tokens leave nothing to trim
        self._storing = False  # stays true where storing a forward failed half-way

    def __getstate__(self) -> dict[str, Any]:
        of_a_forward = ("handle", "_context", "_prompt", "_host_route")
        return {name: x for name, x in self.__dict__.items() if name not in of_a_forward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may be made in inference mode.
        self.__dict__ = {name: normal(x) for name, x in state.items()}
        self.handle, self._context, self._prompt, self._host_route = steps.new_handle(self), None, None, None

    # --- One forward. Of its steps, store and attend_stored keep books on the host: in a compiled graph they are
    # operators (flux_ext/caches/steps.py).

    def begin(self, context: ForwardContext) -> None:
        """Announces a forward's sequences."""
        self._context, self._prompt, self._host_route, self._attended = context, None, None, False
        self.continues = self.is_initialized
        if not self.continues:
            self.route = None  # what a prompt that failed decided does not hold

    def set_route(self, route: Tensor) -> Tensor:
        """A forward's decision, int32 ``[B, Hkv]``; returns what holds: a sequence decides at its first tokens."""
        if self.route is not None and self.undecided is not None:
            route = torch.where(self.undecided, route, self.route)
        self.route = route
        return route

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.num_sequences, num_heads = key_states.shape[:2]
        self.pages = PagedKeyValues(self.num_sequences, num_heads, self.page_size, key_states, value_states)
        self.dropped = np.zeros(self.num_sequences * num_heads, np.int64)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences."""
        if not self.is_initialized:
            raise AttributeError("the batch size is not known before the first update")
        return self.num_sequences

    def check_batch(self, batch_size: int) -> None:
        """ValueError where a forward has more or fewer sequences than are here."""
        if self.is_initialized and batch_size != self.num_sequences:
            raise ValueError(f"the cache holds {self.num_sequences} sequences, got a batch of {batch_size}")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores a forward's keys and values ``[B, Hkv, S, D]``, a prompt's not yet, and hands them back unchanged.

        A prompt's are stored as they are when the next attention module begins; until then the length is that before
        it, and they must not be written over.
        Both are stored in the dtype of the first values: under autocast, those are of another than the keys.
        """
        context, self._context = self._context, None
        if context is None or self.route is None:
            raise RuntimeError(f"{self.cache_name} works only inside a model patched by flux_ext.patch")
        self.check_batch(key_states.shape[0])
        self._update(key_states.detach(), value_states.detach(), self.route, context)
        return key_states, value_states

    def _update(self, k: Tensor, v: Tensor, route: Tensor, context: ForwardContext) -> None:
        if self.continues or torch.compiler.is_compiling():  # a graph's order is the compiler's
            self._store(k, v, route, context)
        else:
            self._prompt = k, v, route
            if self.drops:
                self._host_route = HostCopy(route)

    def prompt_attended(self) -> None:
        """Attention over a prompt was called."""
        self._attended = True

    def store_prompt(self, k: Tensor, v: Tensor, route: Tensor, context: ForwardContext) -> None:
        """Stores a prompt, when the rest of its decoder layer is under way.

        What is stored depends on the route, for which the host waits. It is copied before attention is launched: so
        the host waits for the router alone, and a GPU has attention and feed-forward to do until the host has launched
        what follows.
        """
        self._store(k, v, route, context)

    def _store(self, k: Tensor, v: Tensor, route: Tensor, context: ForwardContext) -> None:
        if torch.compiler.is_compiling():
            steps.store(self.handle, k, v, route, context.host_mask())
        else:
            self.store(k, v, route, context.host_mask())

    def end(self, finished: bool) -> tuple[Tensor, Tensor, Tensor] | None:
        """The attention module has run, or failed; then what it gave is let go of. Returns what :meth:`store_prompt`
        is to be given, where a prompt is left to be stored; it is not kept here.

        Raises:
            RuntimeError: it has finished without calling its attention function, so its prompt is not stored.
        """
        prompt, self._prompt = self._prompt, None
        if prompt is None or (finished and self._attended):
            return prompt
        self._host_route = None
        if finished:
            raise RuntimeError("an attention module gave its keys to the cache and then did not attend to them")
        return None

    def store(self, k: Tensor, v: Tensor, route: Tensor, mask: Tensor | None) -> None:
        """Stores those of the keys and values ``[B, Hkv, S, D]`` that are tokens.

        Args:
            route: int32 ``[B, Hkv]``.
            mask: bool ``[B, slots seen + S]`` on the CPU; None: all new ones are tokens.
        """
        first, q_len, seen = not self.is_initialized, k.shape[2], self.cumulative_length
        if self._storing:
            raise RuntimeError(FAILED)
        step = self.history.advance(seen, k.shape[0], q_len, None if mask is None else mask.numpy())
        self._storing = True
        if first:
            self.lazy_initialization(k, v)
        self.route = normal(route)
        if first or self.waiting:
            self.sparse = self._dropping(route).reshape(-1)
            self._until_trim = 0
        if step.forgotten:
            self._forget(step)
        if not first and not self.record_past and self._until_trim <= 0:
            self._trim()
        if q_len == 1 and step.whole and not first:
            self.pages.append_one(k, v)
        else:
            self._append(k, v, step, first)
        self.cumulative_length += q_len
        self._until_trim -= q_len
        if first or self.waiting or step.forgotten:
            self._find_undecided()
        self._storing = False

    def _append(self, k: Tensor, v: Tensor, step: Step, first: bool) -> None:
        heads = self.pages.num_heads
        begin, count = step.begin.repeat(heads), step.tokens.repeat(heads)
        if not first:
            self.pages.append(k, v, count, begin)
            return
        if not self.record_past:  # what would be trimmed next is never stored
            self.dropped = self._superfluous(count)
        self.pages.fill(k, v, count - self.dropped, begin, self.dropped, self.layout.sink_tokens)

    def _dropping(self, route: Tensor) -> np.ndarray:
        """Which sequence heads drop keys, bool ``[B, Hkv]``. Waits for the device where any do, once per layer and
        prompt."""
        if not self.drops:
            return np.zeros(route.shape, bool)
        copy, self._host_route = self._host_route or HostCopy(route), None
        sparse: np.ndarray = copy.wait() == 1
        return sparse

    def _find_undecided(self) -> None:
        empty = self.pages.length == 0
        self.waiting, self.undecided = self.routed and bool(empty.any()), None
        if self.waiting:
            with torch.inference_mode(False):
                self.undecided = torch.from_numpy(self._by_sequence(empty)).to(self.device)

    def _by_sequence(self, x: np.ndarray) -> np.ndarray:
        """``[B * Hkv]`` as ``[B, Hkv]``."""
        return x.reshape(-1, self.pages.num_heads)

    def attend(self, q: Tensor, scale: float, context: ForwardContext) -> Tensor:
        """Attention of queries ``[B, S, Hq, D]`` over everything stored; returns the same shape."""
        assert self.route is not None
        bounds = context.q_bounds(q.shape[1])
        if torch.compiler.is_compiling() and not self.is_compileable:
            out: Tensor = steps.attend(self.handle, q, self.route, *bounds, scale)
            return out
        return self.attend_stored(q, self.route, *bounds, scale)

    def attend_stored(
        self, q: Tensor, route: Tensor, q_begin: Tensor | None, q_end: Tensor | None, scale: float
    ) -> Tensor:
        """:meth:`attend` with its tensors spelt out."""
        kv = self.stored()
        if kv is None:
            return q.new_zeros(q.shape)  # contiguous, as the operator's output is
        # Several tokens at a time are a chunk of the prompt, unless they are candidates of assisted decoding.
        chunk = self.chunk if q.shape[1] > 1 and not self.record_past else None
        routing = Routing(route, *(chunk or self.decode))
        out, _ = operators.attend(q.to(self.dtype), kv, routing, scale, q_begin, q_end)
        return out.to(q.dtype)

    def stored(self) -> KeyValues | None:
        """What is stored; None where there was only padding so far."""
        return self.pages.stored() if np.count_nonzero(self.pages.length) else None

    # --- Dropping

    def _superfluous(self, seen: np.ndarray) -> np.ndarray:
        """Tokens ``[B * Hkv]`` that no query from position ``seen`` on sees, beyond those dropped; whole units."""
        return np.where(self.sparse, np.maximum(self.layout.gap(seen) - self.dropped, 0), 0)

    def _lost(self, tokens: np.ndarray) -> np.ndarray:
        """Which sequence heads, if they had only so many tokens, would need some that they have dropped."""
        return self.layout.gap(tokens) < self.dropped

    def check_forget(self, forgotten: dict[int, np.ndarray]) -> None:
        """RuntimeError where the given tokens, by sequence, cannot be forgotten: the window would then reach back to
        what was dropped, or the sink beyond what it has."""
        if not self.is_initialized:
            return
        seen, dropped, heads = self.pages.length + self.dropped, self.dropped, self.pages.num_heads
        gone, first = np.zeros_like(seen), np.full_like(seen, np.iinfo(np.int64).max)
        for b, tokens in forgotten.items():
            own = slice(b * heads, (b + 1) * heads)
            gone[own], first[own] = len(tokens), tokens[0]
        behind_gap = first >= self.layout.sink_tokens + dropped
        lost = (gone > 0) & (dropped > 0) & (self._lost(seen - gone) | ~behind_gap)
        if lost.any():
            seq_head = int(lost.argmax())
            raise RuntimeError(
                f"attention_mask takes back {gone[seq_head]} tokens of sequence {seq_head // heads} that were fed as "
                "text: its sparse heads have dropped what would come into view again. Call "
                "cache.activate_past_recording() before the first forward of a batch whose answers may end early"
            )

    def _forget(self, step: Step) -> None:
        heads = self.pages.num_heads
        stored = {}
        for b, tokens in step.forgotten.items():
            for seq_head in range(b * heads, (b + 1) * heads):
                stored[seq_head] = tokens - self.dropped[seq_head]  # where there is a gap, all lie behind it
        self.pages.remove(stored)

    def _trim(self) -> None:
        spare = self._superfluous(self.pages.length + self.dropped)
        self.pages.drop(self.layout.sink_pages, spare // self.page_size)
        self.dropped = self.dropped + spare
        longest = int(self.pages.length.max(where=self.sparse, initial=0))
        self._until_trim = self.layout.least_trimmed - longest

    # --- The contract of transformers' caches

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether any number of tokens can be cropped."""
        return self.record_past or not self.is_initialized or not self.dropped.any()

    def activate_past_recording(self) -> None:
        """From now on nothing is dropped before :meth:`crop`, as assisted decoding needs it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, then drops what sparse heads cannot see any more."""
        self.check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        if remove := -tokens_to_remove:
            self.pages.truncate(self.pages.length - self._tokens_in_last(remove))
            self.cumulative_length -= remove
            if not self.cumulative_length:
                self._clear()  # nothing is left: the next prompt decides anew
                return
            self._find_undecided()
        self._trim()

    def check_crop(self, tokens_to_remove: int) -> None:
        """As :meth:`crop`, but changes nothing.

        Raises:
            ValueError: the number is positive, or more than were seen.
            RuntimeError: sparse heads would need tokens that they have dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized or not tokens_to_remove:
            return
        if -tokens_to_remove > self.cumulative_length:
            raise ValueError(f"crop({tokens_to_remove}): the cache has seen {self.cumulative_length} tokens")
        removed = self._tokens_in_last(-tokens_to_remove)
        if ((removed > 0) & self._lost(self.pages.length + self.dropped - removed)).any():
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that sparse heads have dropped: call "
                "cache.activate_past_recording() before the forward whose tokens are to be cropped"
            )

    def _tokens_in_last(self, slots: int) -> np.ndarray:
        return np.repeat(self.history.tokens_in_last(slots, self.num_sequences), self.pages.num_heads)

    def get_seq_length(self) -> int:
        """Tokens seen, whatever is stored."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self._clear()

    def select(self, sequences: np.ndarray) -> None:
        """Keeps the given sequences, in this order, repeated where they repeat."""
        if not self.is_initialized or self.route is None:
            return
        self.route = normal(self.route[torch.from_numpy(sequences).to(self.route.device)])
        self.sparse = self._by_sequence(self.sparse)[sequences].reshape(-1)
        self.dropped = self._by_sequence(self.dropped)[sequences].reshape(-1)
        self.pages.select(sequences)
        self.num_sequences = len(sequences)
        self._find_undecided()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(to_host(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(to_host(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select(np.arange(self.batch_size).repeat(repeats))

    def offload(self) -> None:
        raise ValueError("FluxCache does not offload layers")

    def stored_tokens(self) -> np.ndarray:
        """int64 ``[B, Hkv]``: how many tokens are stored."""
        return self._by_sequence(self.pages.length)

    def nbytes(self) -> int:
        """Bytes of keys and values really allocated."""
        return self.pages.nbytes() if self.is_initialized else 0

    def dense_nbytes(self) -> int:
        """Bytes of a dense cache of the same forwards: every slot of every sequence, padding included."""
        if not self.is_initialized:
            return 0
        widths = self.pages.keys.shape[-1] + self.pages.values.shape[-1]
        return len(self.pages.length) * self.cumulative_length * widths * self.dtype.itemsize


def to_host(indices: Tensor) -> np.ndarray:
    """Numbers of sequences, int64, of integers or a mask; ValueError where they are neither."""
    array = indices.cpu().numpy()
    if array.ndim != 1 or array.dtype.kind not in "biu":
        raise ValueError(f"indices must be integers [n] or a mask [B], got {indices.dtype} {list(indices.shape)}")
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)
