"""The key-value cache of a patched model: sparse-routed rows drop what no later query can see.

Why dropping is exact. A sparse row stores its first tokens and a contiguous tail; ``dropped`` tokens between
them are gone, so stored index ``j' = j`` before the gap and ``j' = j - dropped`` after it, and a query at
position ``p`` stands at ``p' = p - dropped`` (bottom-right alignment, ``kv_len`` being the stored length). The
streaming pattern evaluated on stored indices is the pattern on true positions:

- sink: ``j' < sink`` holds for the same keys, for the gap begins at or after ``sink``;
- window: with ``dropped % align == 0``, ``align * (p' // align + 1) - window`` is the true window begin minus
  ``dropped``, so of the tail the same keys are inside;
- keys stored between ``sink`` and the gap (a partly filled page) stay invisible: a gap ends no later than the
  window of the next query begins, and windows only move forward.

So one attention call serves any mix of routes, and no kernel knows of the gap (semantics, section 6).

Rows hold tokens, never padding: a mask says which of a forward's slots are tokens, and what it takes back of earlier
ones is removed (:mod:`flux_ext.caches.history`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import operators
from ..config import FluxConfig
from ..forward_context import ForwardContext
from ..operators import KeyValues, Routing
from ..transformers_seam import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from . import steps
from .history import FAILED, History, Step
from .pages import PagedRows, normal


class FluxLayer(CacheLayerMixin):
    """One layer with full attention. Rows are (sequence, KV head) pairs, each full or sparse.

    Trimming happens at the start of the next update, so that the last forward's tokens can still be cropped.

    Args:
        config: pattern and alignment.
        page_size: tokens per page.
        routed: whether a router decides; otherwise every row is full.
    """

    cache_name = "FluxCache"
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: FluxConfig, page_size: int, routed: bool) -> None:
        super().__init__()
        self.pattern = config.decode_pattern()
        self.page_size, self.routed = page_size, routed
        self.head = -(-self.pattern.sink // page_size) * page_size  # tokens before the gap: whole pages
        self.unit = math.lcm(self.pattern.align, page_size)  # tokens are dropped by this many
        self.record_past = False
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
        self._batch: ForwardContext | None = None
        self._storing = False  # stays true where storing a forward failed half-way

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name not in ("handle", "_batch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may be made in inference mode.
        self.__dict__ = {name: normal(x) for name, x in state.items()}
        self.handle, self._batch = steps.new_handle(self), None

    # --- One forward: begin (patch), set_route (router), update (model), attend (attention function). In a graph, the
    # two that keep books on the host, store and attend_stored, are operators.

    def begin(self, batch: ForwardContext) -> None:
        """Announces a forward's sequences."""
        self._batch = batch
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
        self.rows = PagedRows(self.num_sequences, num_heads, self.page_size, key_states, value_states)
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
        """Stores a forward's keys and values ``[B, Hkv, S, D]`` and hands them back unchanged.

        Both are stored in the dtype of the first values: under autocast, those are of another than the keys.
        """
        batch, self._batch = self._batch, None
        if batch is None or self.route is None:
            raise RuntimeError(f"{self.cache_name} works only inside a model patched by flux_ext.patch")
        self.check_batch(key_states.shape[0])
        self._update(key_states.detach(), value_states.detach(), self.route, batch)
        return key_states, value_states

    def _update(self, k: Tensor, v: Tensor, route: Tensor, batch: ForwardContext) -> None:
        if torch.compiler.is_compiling():
            steps.store(self.handle, k, v, route, batch.host_mask())
        else:
            self.store(k, v, route, batch.host_mask())

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
            self.sparse = route.cpu().numpy().astype(bool).reshape(-1)  # waits, once per layer and prompt
        self._forget(step)
        if not first and not self.record_past:
            self._trim()
        heads = self.rows.num_heads
        begin, count = np.repeat(step.begin, heads), np.repeat(step.tokens, heads)
        if first and not self.record_past:  # of a prompt, what would be trimmed next is never stored
            skip = self._superfluous(count)
            self.rows.append(k, v, count - skip, begin, self.head, skip)
            self.dropped = self.dropped + skip
        else:
            self.rows.append(k, v, count, begin)
        self.cumulative_length += q_len
        self._find_undecided()
        self._storing = False

    def _find_undecided(self) -> None:
        empty = self.rows.length == 0
        self.waiting = self.routed and bool(empty.any())
        with torch.inference_mode(False):
            self.undecided = torch.from_numpy(self._by_row(empty)).to(self.device) if self.waiting else None

    def _by_row(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, self.rows.num_heads)

    def attend(self, q: Tensor, scale: float, batch: ForwardContext) -> Tensor:
        """Attention of queries ``[B, S, Hq, D]`` over everything stored; returns the same shape."""
        assert self.route is not None
        # What a single query of padding gets is never used: no bounds, no rows to clear.
        bounds = (None, None) if q.shape[1] == 1 else (batch.seq_start, batch.seq_end)
        if torch.compiler.is_compiling():
            return steps.attend(self.handle, q, self.route, *bounds, scale)
        return self.attend_stored(q, self.route, *bounds, scale)

    def attend_stored(
        self, q: Tensor, route: Tensor, q_begin: Tensor | None, q_end: Tensor | None, scale: float
    ) -> Tensor:
        """:meth:`attend` with its tensors spelt out."""
        if not self.rows.length.any():  # only padding so far
            return q.new_zeros(q.shape)  # contiguous, as the operator's output is
        kv = KeyValues(self.rows.keys, self.rows.values, end=self.rows.kv_len(), page_table=self.rows.page_table())
        return operators.attend(q.to(self.dtype), kv, Routing(route, sparse=self.pattern), scale, q_begin, q_end)[0].to(
            q.dtype
        )

    # --- Dropping

    def _superfluous(self, seen: np.ndarray) -> np.ndarray:
        """Tokens ``[rows]`` that no query from position ``seen`` on can see, in whole units, beyond those dropped."""
        window_begin = self.pattern.align * (seen // self.pattern.align + 1) - self.pattern.window
        spare = np.maximum(window_begin - self.head - self.dropped, 0) // self.unit * self.unit
        return np.where(self.sparse, spare, 0)

    def _lost(self, tokens: np.ndarray) -> np.ndarray:
        """Rows ``[rows]`` that, with so many tokens, would need some that were dropped."""
        window_begin = self.pattern.align * (tokens // self.pattern.align + 1) - self.pattern.window
        return (self.dropped > 0) & (window_begin < self.head + self.dropped)

    def check_forget(self, forgotten: dict[int, np.ndarray]) -> None:
        """RuntimeError where rows cannot do without the given tokens, by sequence: the window would reach back to
        what was dropped, or the sink beyond what it has."""
        if not self.is_initialized:
            return
        seen, dropped, heads = self.rows.length + self.dropped, self.dropped, self.rows.num_heads
        gone, first = np.zeros_like(seen), np.full_like(seen, np.iinfo(np.int64).max)
        for b, tokens in forgotten.items():
            rows = slice(b * heads, (b + 1) * heads)
            gone[rows], first[rows] = len(tokens), tokens[0]
        lost = (gone > 0) & (dropped > 0) & (self._lost(seen - gone) | (first < self.head + dropped))
        if lost.any():
            row = int(lost.argmax())
            raise RuntimeError(
                f"attention_mask takes back {gone[row]} tokens of sequence {row // heads} that were fed as text: its "
                "sparse rows have dropped what would come into view again. Call cache.activate_past_recording() before "
                "the first forward of a batch whose answers may end early"
            )

    def _forget(self, step: Step) -> None:
        heads = self.rows.num_heads
        stored = {}
        for b, tokens in step.forgotten.items():
            for row in range(b * heads, (b + 1) * heads):
                stored[row] = tokens - self.dropped[row]  # of rows that dropped something, all lie behind the gap
        if stored:
            self.rows.remove(stored)

    def _trim(self) -> None:
        spare = self._superfluous(self.rows.length + self.dropped)
        self.rows.drop(self.head // self.page_size, spare // self.page_size)
        self.dropped = self.dropped + spare

    # --- The contract of transformers' caches

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether any number of tokens can be cropped."""
        return self.record_past or not self.is_initialized or not self.dropped.any()

    def activate_past_recording(self) -> None:
        """From now on nothing is dropped before :meth:`crop`, as assisted decoding needs it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, then drops what sparse rows cannot see any more."""
        self.check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        if remove := -tokens_to_remove:
            self.rows.truncate(self.rows.length - self._tokens_in_last(remove))
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
            RuntimeError: sparse rows would need tokens that they have dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized or not tokens_to_remove:
            return
        if -tokens_to_remove > self.cumulative_length:
            raise ValueError(f"crop({tokens_to_remove}): the cache has seen {self.cumulative_length} tokens")
        removed = self._tokens_in_last(-tokens_to_remove)
        if ((removed > 0) & self._lost(self.rows.length + self.dropped - removed)).any():
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that sparse rows have dropped: call "
                "cache.activate_past_recording() before the forward whose tokens are to be cropped"
            )

    def _tokens_in_last(self, slots: int) -> np.ndarray:
        return np.repeat(self.history.tokens_in_last(slots, self.num_sequences), self.rows.num_heads)

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
        self.sparse = self._by_row(self.sparse)[sequences].reshape(-1)
        self.dropped = self._by_row(self.dropped)[sequences].reshape(-1)
        self.rows.select(sequences)
        self.num_sequences = len(sequences)
        self._find_undecided()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(_to_host(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(_to_host(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select(np.arange(self.batch_size).repeat(repeats))

    def offload(self) -> None:
        raise ValueError("FluxCache does not offload layers")

    def stored_tokens(self) -> np.ndarray:
        """int64 ``[B, Hkv]``: tokens stored per row."""
        return self.rows.length.reshape(-1, self.rows.num_heads)

    def nbytes(self) -> int:
        """Bytes of keys and values really allocated."""
        return self.rows.nbytes() if self.is_initialized else 0


def _to_host(indices: Tensor) -> np.ndarray:
    array = indices.cpu().numpy()
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)


class FluxCache(Cache):
    """The cache of a patched model; ``generate`` and a forward with ``use_cache=True`` make one by themselves.

    Padding is never stored. A later ``attention_mask`` may take back tokens that were fed: the padding after an answer
    that ended before the others of its batch. Sparse rows can do so as far as they have dropped nothing that would come
    into view again; :meth:`activate_past_recording` before the first forward makes them keep everything until
    :meth:`crop`.

    A full row keeps every key and value. A sparse row keeps the sink and the window, up to ``align - 1`` more,
    and at most two partly used pages. Layers with a sliding window or without attention keep their stock cache.
    ``get_seq_length`` is the number of tokens seen.

    Args:
        config: the model's configuration.
        flux: the patch's configuration (``flux_ext.get_routers(model).config``).
        page_size: tokens per page, shared by all rows of a layer.
    """

    def __init__(self, config: Any, flux: FluxConfig, page_size: int = 64) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be >= 1, got {page_size}")
        layers: list[Any] = stock_layers(config)
        routed = flux.layers_to_route
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = FluxLayer(flux, page_size, routed is None or i in routed)
        # As they are made: a release's own reset may only zero what they hold.
        self._empty = {i: copy.deepcopy(layer) for i, layer in enumerate(layers) if not isinstance(layer, FluxLayer)}
        super().__init__(layers=layers)
        self.prompt_len: int | None = None  # tokens of the first forward that decide; None: all
        self.history = History()
        for layer in layers:
            if isinstance(layer, FluxLayer):
                layer.history = self.history
                self.history.layers.add(layer)

    def check_batch(self, batch_size: int) -> None:
        """Before a forward.

        Raises:
            ValueError: it has more or fewer sequences than the cache.
            RuntimeError: an earlier forward failed half-way.
        """
        books = not torch.compiler.is_compiling() and len(self.history.layers) > 0  # a static cache keeps none here
        if books and self.get_seq_length() != self.history.length:
            raise RuntimeError(FAILED)
        for layer in self.layers:
            if isinstance(layer, FluxLayer):
                layer.check_batch(batch_size)
                return

    @property
    def routes(self) -> Tensor:
        """int32 ``[B, L, Hkv]`` over the routed layers: 0 full, 1 sparse."""
        routed = [layer for layer in self.layers if isinstance(layer, FluxLayer) and layer.routed]
        routes = [layer.route for layer in routed if layer.route is not None]
        if len(routes) < len(routed):
            raise RuntimeError("nothing is routed before the first forward")
        return torch.stack([r.to(routes[0].device) for r in routes], 1)

    def nbytes(self) -> int:
        """Bytes of keys and values really allocated, stock layers included."""
        return sum(
            layer.nbytes()
            if isinstance(layer, FluxLayer)
            else sum(t.nbytes for t in (getattr(layer, n, None) for n in ("keys", "values")) if t is not None)
            for layer in self.layers
        )

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding gives a tensor
        for layer in self.layers:
            if isinstance(layer, FluxLayer):
                layer.check_crop(tokens_to_remove)
        if self.history.length:
            super().crop(tokens_to_remove)
            self.history.crop(-tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        for i, layer in self._empty.items():
            self.layers[i] = copy.deepcopy(layer)
        self.history.clear()

    def reorder_cache(self, beam_idx: Any) -> None:
        beam_idx = beam_idx.cpu()  # one wait for all layers
        super().reorder_cache(beam_idx)
        self.history.select(_to_host(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = indices.cpu()
        super().batch_select_indices(indices)
        self.history.select(_to_host(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.history.valid is not None:
            self.history.select(np.arange(len(self.history.valid)).repeat(repeats))


def stock_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use, one per decoder layer."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers
