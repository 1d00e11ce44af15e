"""The cache with fixed addresses and shapes: after the prompt, a decode step is index arithmetic on the device.

No step waits for the device or allocates, so ``generate`` compiles the step as one graph and a CUDA graph can
replay it, whatever the routes are. A row owns a run of pages from ``base`` on. Token ``t`` of a sequence lies in
page ``base + place(t // page_size)``, where ``place`` keeps the sink's pages and goes round the others:

    place(page) = page if page < head_pages else head_pages + (page - head_pages) % ring

A full row's ring is as long as the cache. A sparse row's is as long as the window: what its oldest page is
overwritten with comes when no query can see it any more. The page table lists the stored tokens in order, with
the gap of :mod:`flux_ext.cache` after the sink, so the attention call is the same as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from . import ops
from .batch import Batch
from .cache import FluxCache, FluxLayer, stock_layers
from .config import FluxConfig
from .patterns import Full


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

        def on_device(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, dtype)[..., None]

        self.base = on_device((np.cumsum(pages) - pages.reshape(-1)).reshape(pages.shape))  # [B, Hkv, 1]
        self.ring = on_device(np.maximum(pages - self.head_pages, 1))
        self.drops = on_device(sparse & (short < self.full_pages))  # 1 where tokens are dropped
        self.columns = torch.arange(self.full_pages, device=self.device)
        shape = (int(pages.sum()), self.page_size, 1)
        self.k_pool = value_states.new_empty((*shape, head_dim))
        self.v_pool = value_states.new_empty((*shape, value_states.shape[-1]))
        self.seen = torch.zeros(self.num_sequences, dtype=torch.int64, device=self.device)  # valid tokens
        self.slots = torch.zeros((), dtype=torch.int64, device=self.device)  # tokens seen, padding included
        self.table = torch.zeros((*pages.shape, self.full_pages), dtype=torch.int32, device=self.device)
        self.kv_len = torch.zeros(pages.shape, dtype=torch.int32, device=self.device)
        for t in (self.k_pool, self.v_pool, self.seen, self.slots, self.table, self.kv_len):
            torch._dynamo.mark_static_address(t)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.num_sequences

    def _place(self, page: Tensor) -> Tensor:
        """Pages of the pool for pages of the sequences, int64 ``[B, Hkv, n]`` both."""
        return self.base + torch.where(
            page < self.head_pages, page, self.head_pages + (page - self.head_pages) % self.ring
        )

    def _gap(self, seen: Tensor) -> Tensor:
        """int64 ``[B, Hkv, 1]``: tokens dropped before a query at position ``seen [B]``."""
        window_begin = self.pattern.align * (seen // self.pattern.align + 1) - self.pattern.window
        gap = (window_begin - self.head).clamp(min=0) // self.unit * self.unit
        return gap[:, None, None] * self.drops

    def _write(self, k: Tensor, v: Tensor, position: Tensor, kept: Tensor | None = None) -> None:
        """Stores ``k[:, :, i]`` as token ``position[..., i]`` (``[B, Hkv, n]``), where ``kept``."""
        slot = self._place(position // self.page_size) * self.page_size + position % self.page_size
        for pool, x in ((self.k_pool, k), (self.v_pool, v)):
            flat, x = pool.view(-1, pool.shape[-1]), x.detach().to(pool.dtype)
            if kept is None:
                flat.index_copy_(0, slot.reshape(-1), x.reshape(-1, x.shape[-1]))
            else:
                flat.index_copy_(0, slot[kept], x[kept])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the prompt's keys and values ``[B, Hkv, S, D]``, or one step's, and hands them back unchanged."""
        q_len = key_states.shape[2]
        if not self.is_initialized:
            self._store_prompt(key_states, value_states)
            return key_states, value_states
        if q_len != 1:
            raise ValueError(f"FluxStaticCache takes one prompt and then single tokens, got {q_len} more tokens")
        if self.device.type == "cpu" and not torch.compiler.is_compiling() and int(self.slots) >= self.max_cache_len:
            raise ValueError(f"the cache is full: max_cache_len is {self.max_cache_len}")
        self.continues = True
        seen = self.seen.clamp(max=self.max_cache_len - 1)  # unchecked, a token too many stays in its own row
        gap = self._gap(seen)
        position = seen[:, None, None].expand(-1, key_states.shape[1], 1)
        self._write(key_states, value_states, position)
        page = self.columns + torch.where(self.columns < self.head_pages, 0, gap // self.page_size)
        self.table.copy_(self._place(page))
        self.kv_len.copy_((position + 1 - gap)[..., 0])
        self.seen.add_(1)
        self.slots.add_(1)
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
        self.seen.copy_(end - begin)
        self.slots.fill_(k.shape[2])
        position = (torch.arange(k.shape[2], device=self.device) - begin[:, None])[:, None]  # [B, 1, S]
        inside = (position >= 0) & (position < (end - begin)[:, None, None])
        kept = inside & ((position < self.head) | (position >= self.head + self._gap(self.seen)))
        self._write(k, v, position.expand(k.shape[:3]), kept)

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
        gap = self._gap(self.seen)[..., 0]
        return (self.seen[:, None] - gap).cpu().numpy()

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
        if page_size < 1 or max_cache_len < 1:
            raise ValueError(f"page_size and max_cache_len must be >= 1, got {page_size} and {max_cache_len}")
        stock = stock_layers(config)
        if others := [i for i, layer in enumerate(stock) if type(layer) is not DynamicLayer]:
            raise ValueError(f"FluxStaticCache needs full attention in every layer, {others} have not: use FluxCache")
        routed = flux.layers_to_route
        layers: list[Any] = [
            FluxStaticLayer(flux, page_size, routed is None or i in routed, max_cache_len) for i in range(len(stock))
        ]
        Cache.__init__(self, layers=layers)
        self.prompt_len = None
