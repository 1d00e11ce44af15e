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
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .batch import Batch
from .config import FluxConfig
from .pages import PagedRows
from .patterns import Full
from .transformers_seam import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


class FluxLayer(CacheLayerMixin):
    """One layer with full attention. Rows are (sequence, KV head) pairs, each full or sparse.

    Trimming happens at the start of the next update, so that the last forward's tokens can still be cropped.

    Args:
        config: pattern and alignment.
        page_size: tokens per page.
        routed: whether a router decides; otherwise every row is full.
    """

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
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0  # tokens seen, padding included: positions count from it
        self.route: Tensor | None = None  # int32 [B, Hkv]
        self.continues = False  # whether the last update added to tokens already here
        self.waiting = False  # whether a sequence had only padding so far
        self._batch: Batch | None = None
        self._croppable = 0  # trailing tokens that belong to every sequence

    # --- One forward: begin (patch), set_route (router), update (model), attend (attention function).

    def begin(self, batch: Batch) -> None:
        """Announces a forward's sequences."""
        self._batch = batch

    def set_route(self, route: Tensor) -> Tensor:
        """A forward's decision, int32 ``[B, Hkv]``; returns what holds: a sequence decides at its first tokens."""
        if self.route is not None:
            waiting = (self.rows.length == 0).reshape(-1, self.rows.num_heads)
            route = torch.where(torch.from_numpy(waiting).to(route.device), route, self.route)
            self.sparse = route.cpu().numpy().astype(bool).reshape(-1)
        self.route = route
        return route

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.route is None:
            raise RuntimeError("FluxCache works only inside a model patched by flux_ext.patch")
        self.dtype, self.device = value_states.dtype, value_states.device
        batch_size, num_heads = key_states.shape[:2]
        self.rows = PagedRows(batch_size, num_heads, self.page_size, key_states, value_states)
        self.sparse = self.route.cpu().numpy().astype(bool).reshape(-1)  # waits once per layer and prompt
        self.dropped = np.zeros(batch_size * num_heads, np.int64)
        self.is_initialized = True

    def _keep_route(self) -> None:
        """A route decided in inference mode becomes a normal tensor: the cache may go on outside."""
        if self.route is not None and self.route.is_inference():
            with torch.inference_mode(False):
                self.route = self.route.clone()

    @property
    def batch_size(self) -> int:
        """Sequences."""
        if not self.is_initialized:
            raise AttributeError("the batch size is not known before the first update")
        return self.rows.batch_size

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores a forward's keys and values ``[B, Hkv, S, D]`` and hands them back unchanged.

        Both are stored in the dtype of the first values: under autocast, those are of another than the keys.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("FluxCache works only inside a model patched by flux_ext.patch")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keep_route()
        q_len = key_states.shape[2]
        begin, end = batch.host_bounds(self.batch_size, q_len)
        self.continues = self.cumulative_length > 0
        if self.continues and not self.record_past:
            self._trim()
        heads = self.rows.num_heads
        row_begin, count = np.repeat(begin, heads), np.repeat(end - begin, heads)
        if self.continues or self.record_past:
            self.rows.append(key_states, value_states, count, row_begin)
        else:  # of a prompt, what would be trimmed next is never stored
            skip = self._superfluous(count)
            self.rows.append(key_states, value_states, count - skip, row_begin, self.head, skip)
            self.dropped = self.dropped + skip
        self.waiting = self.routed and not self.rows.length.all()
        padded = (end < q_len).any()
        self._croppable = 0 if padded else int((q_len - begin).min()) + (0 if begin.any() else self._croppable)
        self.cumulative_length += q_len
        return key_states, value_states

    @torch.compiler.disable
    def attend(self, q: Tensor, scale: float, batch: Batch) -> Tensor:
        """Attention of queries ``[B, S, Hq, D]`` over everything stored; returns the same shape."""
        return ops.attend(
            q.to(self.dtype),
            self.rows.keys,
            self.rows.values,
            self.route,
            Full(),
            self.pattern,
            scale,
            batch.seq_start,
            batch.seq_end,
            None,
            self.rows.kv_len(),
            self.rows.page_table(),
        )[0].to(q.dtype)

    # --- Dropping

    def _superfluous(self, seen: np.ndarray) -> np.ndarray:
        """Tokens ``[rows]`` that no query from position ``seen`` on can see, in whole units, beyond those dropped."""
        window_begin = self.pattern.align * (seen // self.pattern.align + 1) - self.pattern.window
        spare = np.maximum(window_begin - self.head - self.dropped, 0) // self.unit * self.unit
        return np.where(self.sparse, spare, 0)

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
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        if remove := -tokens_to_remove:
            if remove > self._croppable:
                raise RuntimeError(
                    f"crop({tokens_to_remove}): only the last {self._croppable} tokens belong to every sequence"
                )
            seen = self.rows.length + self.dropped - remove
            window_begin = self.pattern.align * (seen // self.pattern.align + 1) - self.pattern.window
            if ((self.dropped > 0) & (window_begin < self.head + self.dropped)).any():
                raise RuntimeError(
                    f"crop({tokens_to_remove}) needs tokens that sparse rows have dropped: call "
                    "cache.activate_past_recording() before the forward whose tokens are to be cropped"
                )
            self.rows.truncate(self.rows.length - remove)
            self.cumulative_length -= remove
            self._croppable -= remove
            if not self.cumulative_length:
                self._clear()  # nothing is left: the next prompt decides anew
                return
        self._trim()

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
        self.route = self.route[torch.from_numpy(sequences).to(self.route.device)]
        heads = self.rows.num_heads
        self.sparse = self.sparse.reshape(-1, heads)[sequences].reshape(-1)
        self.dropped = self.dropped.reshape(-1, heads)[sequences].reshape(-1)
        self.rows.select(sequences)

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
        super().__init__(layers=layers)
        self.prompt_len: int | None = None  # tokens of the first forward that decide; None: all

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
        super().crop(int(tokens_to_remove))  # assisted decoding gives a tensor

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx.cpu())  # one wait for all layers

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices.cpu())


def stock_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use, one per decoder layer."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers
