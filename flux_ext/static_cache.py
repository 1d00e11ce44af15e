"""The cache with fixed addresses and shapes: after the prompt, a decode step is index arithmetic on the device.

No step waits for the device or allocates, so ``generate`` compiles the step as one graph and a CUDA graph can
replay it, whatever the routes are. A row owns a run of pages from ``base`` on. Token ``t`` of a sequence lies in
page ``base + place(t // page_size)``, where ``place`` keeps the sink's pages and goes round the others:

    place(page) = page if page < head_pages else head_pages + (page - head_pages) % ring

A full row's ring is as long as the cache. A sparse row's is as long as the window: what its oldest page is
overwritten with comes when no query can see it any more. The page table lists the stored tokens in order, with
the gap of :mod:`flux_ext.cache` after the sink, so the attention call is the same as there. The prompt is stored
with torch's operators, a step with one of ours: :func:`flux_ext.ops.append`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .batch import Batch
from .cache import FluxCache, FluxLayer, stock_layers
from .config import FluxConfig
from .patterns import Full
from .transformers_seam import Cache, DynamicLayer


class FluxStaticLayer(FluxLayer):
    """One layer: a prompt, then steps of one token per sequence.

    Args:
        config, page_size, routed: as for :class:`~flux_ext.cache.FluxLayer`.
        max_cache_len: tokens per sequence, padding included.
    """

    is_compileable = True

    def __init__(self, config: FluxConfig, page_size: int, routed: bool, max_cache_len: int) -> None:
        self.max_cache_len = max_cache_len
        super().__init__(config, page_size, routed)
        self.head_pages = self.head // page_size
        # The window, the tokens that alignment and whole units add to it, and the one to come.
        longest = self.pattern.window + self.pattern.align + self.unit + 1
        self.sparse_ring = -(-longest // page_size) + 1
        self.full_pages = -(-max_cache_len // page_size)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lays out the rows' pages for the routes at hand; waits for the device, once per layer and prompt."""
        if self.route is None:
            raise RuntimeError("FluxStaticCache works only inside a model patched by flux_ext.patch")
        self.dtype, self.device = value_states.dtype, value_states.device
        self.num_sequences, _, q_len, head_dim = key_states.shape
        if q_len > self.max_cache_len:
            raise ValueError(f"the prompt has {q_len} tokens, max_cache_len is {self.max_cache_len}")
        sparse = self.route.cpu().numpy() == 1
        short = min(self.head_pages + self.sparse_ring, self.full_pages)
        pages = np.where(sparse, short, self.full_pages)

        def on_device(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x.astype(np.int32)).to(self.device)

        # All [B, Hkv]: a row's first page, the pages of its ring, the valid tokens it has seen and those it stores.
        self.base = on_device((np.cumsum(pages) - pages.reshape(-1)).reshape(pages.shape))
        self.ring = on_device(np.maximum(pages - self.head_pages, 1))
        self.seen, self.kv_len = torch.zeros_like(self.base), torch.zeros_like(self.base)
        self.slots = torch.zeros((), dtype=torch.int64, device=self.device)  # tokens seen, padding included
        self.table = torch.zeros((*pages.shape, self.full_pages), dtype=torch.int32, device=self.device)
        shape = (int(pages.sum()), self.page_size, 1)
        self.k_pool = value_states.new_empty((*shape, head_dim))
        self.v_pool = value_states.new_empty((*shape, value_states.shape[-1]))
        for t in (self.k_pool, self.v_pool, self.base, self.ring, self.table, self.kv_len, self.seen, self.slots):
            torch._dynamo.mark_static_address(t)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.num_sequences

    def _gap(self) -> Tensor:
        """int64 ``[B, Hkv]``: tokens dropped before the query to come."""
        window_begin = self.pattern.align * (self.seen.long() // self.pattern.align + 1) - self.pattern.window
        gap = (window_begin - self.head).clamp(min=0) // self.unit * self.unit
        return gap * (self.head_pages + self.ring < self.full_pages)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the prompt's keys and values ``[B, Hkv, S, D]``, or one step's, and hands them back unchanged."""
        q_len = key_states.shape[2]
        if not self.is_initialized:
            self._store_prompt(key_states, value_states)
            return key_states, value_states
        if q_len != 1:
            raise ValueError(f"FluxStaticCache takes one prompt and then single tokens, got {q_len} more tokens")
        if key_states.shape[0] != self.num_sequences:
            raise ValueError(f"the cache holds {self.num_sequences} sequences, got {key_states.shape[0]}")
        if self.device.type == "cpu" and not torch.compiler.is_compiling() and int(self.slots) >= self.max_cache_len:
            raise ValueError(f"the cache is full: max_cache_len is {self.max_cache_len}")
        self.continues = True
        ops.append(
            key_states,
            value_states,
            self.k_pool,
            self.v_pool,
            self.base,
            self.ring,
            self.table,
            self.kv_len,
            self.seen,
            self.slots,
            self.pattern,
            self.max_cache_len,
        )
        return key_states, value_states

    @torch.compiler.disable
    def _store_prompt(self, k: Tensor, v: Tensor) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("FluxStaticCache works only inside a model patched by flux_ext.patch")
        with torch.inference_mode(False):
            self.lazy_initialization(k, v)
        self._keep_route()
        begin, end = (torch.from_numpy(x).to(self.device) for x in batch.host_bounds(k.shape[0], k.shape[2]))
        self.seen.copy_((end - begin)[:, None].expand_as(self.seen))
        self.slots.fill_(k.shape[2])
        position = (torch.arange(k.shape[2], device=self.device) - begin[:, None])[:, None]  # [B, 1, S]
        inside = (position >= 0) & (position < (end - begin)[:, None, None])
        kept = inside & ((position < self.head) | (position >= self.head + self._gap()[..., None]))
        page = position // self.page_size
        around = self.head_pages + (page - self.head_pages) % self.ring[..., None]
        page = self.base[..., None] + torch.where(page < self.head_pages, page, around)
        slot = (page * self.page_size + position % self.page_size)[kept]  # int64, like the positions
        for pool, x in ((self.k_pool, k), (self.v_pool, v)):
            pool.view(-1, pool.shape[-1]).index_copy_(0, slot, x.detach()[kept].to(pool.dtype))

    def attend(self, q: Tensor, scale: float, batch: Batch) -> Tensor:
        """Attention of one query per sequence, ``[B, 1, Hq, D]``, over everything stored."""
        spans = (None, None, None, self.kv_len)
        pools = self.k_pool, self.v_pool
        out = ops.attend(q.to(self.dtype), *pools, self.route, Full(), self.pattern, scale, *spans, self.table)[0]
        return out.to(q.dtype)

    def get_seq_length(self) -> Any:
        return self.slots if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("FluxStaticCache cannot be cropped: use FluxCache for assisted decoding")

    def select(self, sequences: np.ndarray) -> None:
        if self.is_initialized:
            raise ValueError("FluxStaticCache cannot reorder sequences: use FluxCache for beam search")

    def stored_tokens(self) -> np.ndarray:
        return (self.seen - self._gap()).cpu().numpy()

    def nbytes(self) -> int:
        return self.k_pool.nbytes + self.v_pool.nbytes if self.is_initialized else 0


class FluxStaticCache(FluxCache):
    """A :class:`~flux_ext.FluxCache` of fixed size for compiled decoding and CUDA graphs.

    ``generate(cache_implementation="static")`` makes one. Full rows have room for ``max_cache_len`` tokens, sparse
    rows for the sink and the window. Greedy decoding and sampling; every layer must have full attention.

    Args:
        config, flux, page_size: as for FluxCache.
        max_cache_len: tokens per sequence, prompt and padding included. A token more is a ValueError on the CPU;
            on CUDA and in a compiled step a check would wait for the device, so there it overwrites the sequence's
            last token, and what follows is wrong.
    """

    def __init__(self, config: Any, flux: FluxConfig, max_cache_len: int, page_size: int = 64) -> None:
        for name, n in (("page_size", page_size), ("max_cache_len", max_cache_len)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {n}")
        stock = stock_layers(config)
        if others := [i for i, layer in enumerate(stock) if type(layer) is not DynamicLayer]:
            raise ValueError(f"FluxStaticCache needs full attention in every layer, {others} have not: use FluxCache")
        routed = flux.layers_to_route
        layers: list[Any] = [
            FluxStaticLayer(flux, page_size, routed is None or i in routed, max_cache_len) for i in range(len(stock))
        ]
        Cache.__init__(self, layers=layers)
        self.prompt_len = None
