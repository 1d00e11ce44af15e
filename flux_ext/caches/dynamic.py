"""The key-value cache of a patched model: all its layers.

:mod:`flux_ext.caches.layer` says what one of them holds and drops.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import FluxConfig
from ..forward_context import ForwardContext
from ..transformers_seam import Cache, DynamicCache, DynamicLayer
from .history import FAILED, History
from .layer import FluxCacheLayer, to_host
from .summary import held, summary


class FluxCache(Cache):
    """The cache of a patched model; ``generate`` and a forward with ``use_cache=True`` make one by themselves.

    Each KV head of each sequence keeps what its route asks for: a full one every key and value, a sparse one the sink
    and the window, up to ``align - 1`` tokens more, and at most two partly used pages. Layers with a sliding window or
    without attention keep their stock cache.

    Padding is never stored. A later ``attention_mask`` may take back tokens that were fed: the padding after an answer
    that ended before the others of its batch. Sparse heads can do so as far as they have dropped nothing that would
    come into view again; :meth:`activate_past_recording` before the first forward makes them keep everything until
    :meth:`crop`.

    ``get_seq_length`` is the number of tokens seen.

    Args:
        config: the model's configuration.
        flux: the patch's configuration (``flux_ext.get_routers(model).config``).
        page_size: tokens per page; the pages of a layer are shared by all heads and sequences.
    """

    def __init__(self, config: Any, flux: FluxConfig, page_size: int = 64) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be >= 1, got {page_size}")
        layers: list[Any] = stock_cache_layers(config)
        routed = flux.layers_to_route
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = FluxCacheLayer(flux, page_size, routed is None or i in routed)
        # As they are made: a release's own reset may only zero what they hold.
        self._empty = {
            i: copy.deepcopy(layer) for i, layer in enumerate(layers) if not isinstance(layer, FluxCacheLayer)
        }
        super().__init__(layers=layers)
        self.flux = flux
        self.prompt_len: int | None = None  # tokens of the first forward that decide; None: all
        self.unfinished = False  # whether a forward has begun and not ended, so that layers may differ
        self.history = History()
        for layer in layers:
            if isinstance(layer, FluxCacheLayer):
                layer.history = self.history
                self.history.cache_layers.add(layer)

    def check_batch(self, batch_size: int) -> None:
        """Before a forward of ``batch_size`` sequences.

        Raises:
            ValueError: it has more or fewer sequences than the cache.
            RuntimeError: an earlier forward failed half-way.
        """
        if self.unfinished and self._differ():
            raise RuntimeError(FAILED)
        # A static cache keeps no history.
        books = not torch.compiler.is_compiling() and len(self.history.cache_layers) > 0
        if books and self.get_seq_length() != self.history.length:
            raise RuntimeError(FAILED)
        for layer in self.layers:
            if isinstance(layer, FluxCacheLayer):
                layer.check_batch(batch_size)
                return

    def check_mask(self, context: ForwardContext, batch_size: int, q_len: int) -> None:
        """Before a forward, where the first layer is one of transformers': that stores whatever the mask says, so what
        the first of ours would find wrong with it is looked for here.

        Args:
            context: of the forward, with its mask.
            batch_size, q_len: its sequences and slots.

        Raises:
            ValueError, RuntimeError: as :meth:`~flux_ext.caches.history.History.advance`.
        """
        if isinstance(self.layers[0], FluxCacheLayer) or torch.compiler.is_compiling():
            return
        if (mask := context.host_mask()) is not None:
            self.history.check(batch_size, q_len, mask.numpy())

    def _differ(self) -> bool:
        """Whether layers have seen different numbers of tokens, or, as states of linear attention do not count them,
        may have. Waits for the device where the cache is static."""
        lengths: list[Any] = [getattr(layer, "get_seq_length", None) for layer in self.layers]
        return None in lengths or len({int(length()) for length in lengths}) > 1

    @property
    def routes(self) -> Tensor:
        """int32 ``[B, L, Hkv]`` over the routed layers: 0 full, 1 sparse."""
        routed = [layer for layer in self.layers if isinstance(layer, FluxCacheLayer) and layer.routed]
        routes = [layer.route for layer in routed if layer.route is not None]
        if len(routes) < len(routed):
            raise RuntimeError("nothing is routed before the first forward")
        return torch.stack([r.to(routes[0].device) for r in routes], 1)

    def nbytes(self) -> int:
        """Bytes of keys and values really allocated, stock layers included."""
        return sum(
            layer.nbytes()
            if isinstance(layer, FluxCacheLayer)
            else sum(t.nbytes for t in (getattr(layer, n, None) for n in ("keys", "values")) if t is not None)
            for layer in self.layers
        )

    def dense_nbytes(self) -> int:
        """Bytes that transformers' own cache would have after the same forwards: everything in every layer, padding
        included; for a :class:`~flux_ext.FluxStaticCache` that of as many tokens as it has room for."""
        own = [layer for layer in self.layers if isinstance(layer, FluxCacheLayer)]
        stock = self.nbytes() - sum(layer.nbytes() for layer in own)
        return stock + sum(layer.dense_nbytes() for layer in own)

    def summary(self) -> str:
        """What the cache holds, as a few lines of text: the layers of each sequence as ``FFss`` (full, sparse), the MB
        kept and the MB that a dense cache would have (:meth:`nbytes`, :meth:`dense_nbytes`). Waits for the device."""
        return summary(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {held(self)})"

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding gives a tensor
        for layer in self.layers:
            if isinstance(layer, FluxCacheLayer):
                layer.check_crop(tokens_to_remove)
            elif getattr(layer, "is_sliding", False):
                _check_sliding_crop(layer, tokens_to_remove)
        if not self.history.length:
            return
        # Others refuse, all alike, when they are asked: before anything is changed.
        layers: list[Any] = sorted(self.layers, key=lambda layer: isinstance(layer, FluxCacheLayer))
        for layer in layers:
            layer.crop(tokens_to_remove)
        self.history.crop(-tokens_to_remove)
        if not self.history.length:
            self.reset()  # other sequences may come

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        for i, layer in self._empty.items():
            fresh = copy.deepcopy(layer)
            if getattr(self.layers[i], "record_past", False):
                fresh.activate_past_recording()
            self.layers[i] = fresh
        self.history.clear()
        self.unfinished, self.prompt_len = False, None

    def reorder_cache(self, beam_idx: Any) -> None:
        beam_idx = self._selection(beam_idx)
        super().reorder_cache(beam_idx)
        self.history.select(beam_idx.numpy())

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = self._selection(indices)
        super().batch_select_indices(indices)
        self.history.select(indices.numpy())

    def _selection(self, indices: Tensor) -> Tensor:
        """Numbers of sequences, or a mask of them, as numbers from 0 on the CPU: one wait for all layers.

        Raises:
            ValueError: they are of another shape or kind, or of sequences that are not here.
        """
        selection = torch.from_numpy(to_host(indices))
        for layer in self.layers:
            if isinstance(layer, FluxCacheLayer) and layer.is_initialized:
                count = layer.batch_size
                outside = (selection < -count) | (selection >= count)
                if outside.any() or (indices.dtype == torch.bool and len(indices) != count):
                    got = f"a mask of {len(indices)}" if indices.dtype == torch.bool else int(selection[outside][0])
                    raise ValueError(f"indices must be of the {count} sequences that the cache holds, got {got}")
                return selection % count
        return selection

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.history.valid is not None:
            self.history.select(np.arange(len(self.history.valid)).repeat(repeats))


def _check_sliding_crop(layer: Any, tokens_to_remove: int) -> None:
    """RuntimeError where a layer with a sliding window has too few tokens left: it would go on with those it has."""
    left = layer.get_seq_length() + tokens_to_remove
    if tokens_to_remove and left > 0:
        stored: int = layer.keys.shape[-2]
        if stored + tokens_to_remove < min(left, layer.sliding_window - 1):
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that a layer with a sliding window has dropped: call "
                "cache.activate_past_recording() before the forward whose tokens are to be cropped"
            )


def stock_cache_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use, one per decoder layer."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers
