"""The cache of fixed size: every tensor keeps its address and shape, so that a decode step can be one CUDA graph.

After the prompt, a step must not allocate, nor wait for the device to learn a length. So each sequence head (one KV
head of one sequence) gets all its pages with the prompt, a run of the pool from page ``base`` on, and lengths and page
tables are tensors that the step itself writes (:func:`flux_ext.operators.append`):

- The run begins with the pages of the sink, which stay. The other pages are a ring: when it is full, the next token
  overwrites the oldest page (:meth:`~flux_ext.caches.layout.PageLayout.place`).
- The ring of a full sequence head holds the whole length of the cache and is never gone round. That of a sparse one is
  as long as the window, so what is overwritten is what no query sees any more.
- The page table lists the pages in the order of their tokens, without those that were dropped. For attention this is a
  paged cache like the dynamic one, with the same gap after the sink (:mod:`flux_ext.caches.layer`).

The prompt is stored by torch's operators. In a step, some sequences may have padding instead of a token: the cache is
told by a tensor on the device (:meth:`FluxStaticCache.active`), read off the attention mask in the column of this step.
The step's number is on the device too (``slots``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import operators
from ..config import FluxConfig
from ..forward_context import ForwardContext
from ..operators import KeyValues
from ..transformers_seam import Cache, DynamicLayer
from .dynamic import FluxCache, stock_cache_layers
from .history import FAILED, History, token_rows
from .layer import FluxCacheLayer
from .pages import cut_pages, normal


class FluxStaticCacheLayer(FluxCacheLayer):
    """The keys and values of one decoder layer: a prompt, then steps of one token per sequence.

    Args:
        config, page_size, routed: as for :class:`~flux_ext.caches.layer.FluxCacheLayer`.
        max_cache_len: tokens per sequence, padding included.
        any_routes: whether the pools have room for everything routed full, whatever the first routes are.
    """

    cache_name = "FluxStaticCache"
    is_compileable = True

    def __init__(
        self, config: FluxConfig, page_size: int, routed: bool, max_cache_len: int, any_routes: bool = False
    ) -> None:
        self.max_cache_len, self.any_routes = max_cache_len, any_routes
        self.k_pool: Tensor | None = None  # from the first prompt on, all tensors keep their addresses
        self.route_kept: Tensor | None = None  # the tensor of `route`, also while reset() leaves that None
        super().__init__(config, page_size, routed)
        self.full_pages = -(-max_cache_len // page_size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.route is not None:
            self.route_kept = self.route
        self._mark_addresses()

    def set_route(self, route: Tensor) -> Tensor:
        """As for the dynamic cache, but one tensor keeps the route, for a captured graph reads it."""
        if self.k_pool is None:
            self.route = route.clone(memory_format=torch.contiguous_format)
            return self.route
        if self.route is not None:  # a sequence that has had padding only decides now
            route = torch.where(self.seen == 0, route, self.route)
        assert self.route_kept is not None
        self.route = self.route_kept.copy_(route)
        return self.route

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Tensors for as many sequences and heads as there are; and pools, for the routes at hand."""
        self.dtype, self.device = value_states.dtype, value_states.device
        self.num_sequences, num_heads, _, head_dim = key_states.shape
        seq_heads = (self.num_sequences, num_heads)

        # Of each sequence head the first page, the pages of its ring and the tokens it has seen: written next.
        self.base, self.ring, self.seen = (
            torch.empty(seq_heads, dtype=torch.int32, device=self.device) for _ in range(3)
        )
        self.slots = torch.empty((), dtype=torch.int64, device=self.device)  # tokens seen, padding included
        # The tokens it stores and where: each step writes both.
        self.kv_len = torch.zeros(seq_heads, dtype=torch.int32, device=self.device)
        self.table = torch.zeros((*seq_heads, self.full_pages), dtype=torch.int32, device=self.device)
        shape = (self.num_pages, self.page_size, 1)
        k_pool = value_states.new_empty((*shape, head_dim))
        self.v_pool = value_states.new_empty((*shape, value_states.shape[-1]))
        self.k_pool = k_pool  # last: it says that all the others are there

    def _mark_addresses(self) -> None:
        if self.k_pool is None:
            return
        for t in (self.k_pool, self.v_pool, self.base, self.ring, self.table, self.kv_len, self.seen, self.slots):
            torch._dynamo.mark_static_address(t)

    def _lay_out(self, k: Tensor, v: Tensor, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives each sequence head its pages, those that are ``sparse [B, Hkv]`` a short ring. Returns the first page
        and the pages of the ring, ``[B, Hkv]`` each."""
        short = min(self.layout.sink_pages + self.layout.ring_pages(), self.full_pages)
        pages = np.where(sparse, short, self.full_pages)
        needed = int(pages.sum())
        if self.k_pool is None:
            self.num_pages = self.full_pages * pages.size if self.any_routes else needed
            self.lazy_initialization(k, v)
        elif needed > self.num_pages:
            raise ValueError(
                f"after reset() the pools keep their {self.num_pages} pages, but the new prompt's routes need "
                f"{needed}: make the cache with any_routes=True, or a new one"
            )
        base = np.cumsum(pages).reshape(pages.shape) - pages
        ring = np.maximum(pages - self.layout.sink_pages, 1)
        for t, x in ((self.base, base), (self.ring, ring)):
            t.copy_(torch.from_numpy(x.astype(np.int32)), non_blocking=True)
        return base, ring

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.num_sequences

    def _gap(self, seen: np.ndarray, ring: np.ndarray) -> np.ndarray:
        """Tokens dropped before the query to come, of ``seen`` ones. Only who has a short ring drops any."""
        gap: np.ndarray = self.layout.gap(seen) * (self.layout.sink_pages + ring < self.full_pages)
        return gap

    def _update(self, k: Tensor, v: Tensor, route: Tensor, context: ForwardContext) -> None:
        if not self.continues:
            if not torch.compiler.is_compiling():
                self._check_prompt(k, v)  # before its attention
            return super()._update(k, v, route, context)
        if k.shape[2] != 1:
            raise ValueError(f"FluxStaticCache takes one prompt and then single tokens, got {k.shape[2]} more tokens")
        assert self.k_pool is not None
        if self.device.type == "cpu" and not torch.compiler.is_compiling() and int(self.slots) >= self.max_cache_len:
            raise ValueError(f"the cache is full: max_cache_len is {self.max_cache_len}")
        operators.append(
            k,
            v,
            self.k_pool,
            self.v_pool,
            self.base,
            self.ring,
            self.table,
            self.kv_len,
            self.seen,
            self.slots,
            self.layout.pattern,
            self.max_cache_len,
            context.seq_end,  # which sequences have a token
        )

    def _check_prompt(self, k: Tensor, v: Tensor) -> None:
        if k.shape[2] > self.max_cache_len:
            raise ValueError(f"the prompt has {k.shape[2]} tokens, max_cache_len is {self.max_cache_len}")
        if (pool := self.k_pool) is None:
            return
        want = (k.shape[0], k.shape[1], k.shape[-1], v.dtype, v.device)
        had = (*self.base.shape, pool.shape[-1], pool.dtype, pool.device)
        if want != had:
            raise ValueError(
                "after reset() a FluxStaticCache takes prompts of the same sequences, KV heads, head_dim, dtype "
                f"and device: {list(map(str, had))}, got {list(map(str, want))}"
            )

    def store(self, k: Tensor, v: Tensor, route: Tensor, mask: Tensor | None) -> None:
        """Stores the prompt. Waits for the device, once per layer: its routes say how many pages are needed."""
        self._check_prompt(k, v)
        q_len = k.shape[2]
        begin, count = token_rows(None if mask is None else mask[:, :q_len].numpy(), k.shape[0], q_len)
        # A sequence that has had padding only decides later: it gets room for either route.
        sparse = self._dropping(route) & (count > 0)[:, None]
        self.waiting = self.routed and not count.all()
        with torch.inference_mode(False):
            base, ring = self._lay_out(k, v, sparse)
            self.route = self.route_kept = normal(route)
            self._mark_addresses()
        seen = np.broadcast_to(count[:, None], ring.shape)
        self.seen.copy_(torch.from_numpy(seen.astype(np.int32)), non_blocking=True)
        self.slots.fill_(q_len)
        # By pages, [B, Hkv, pages]: what is dropped are whole ones.
        position = np.arange(0, q_len, self.page_size)
        behind_gap = self.layout.sink_tokens + self._gap(seen, ring)[..., None]
        kept = (position < seen[..., None]) & ((position < self.layout.sink_tokens) | (position >= behind_gap))
        b, h, page = kept.nonzero()
        first, target = begin[b] + position[page], base[b, h] + self.layout.place(page, ring[b, h])
        index = torch.from_numpy(np.array([b, h, first, target])[..., None]).to(self.device, non_blocking=True)
        for pool, x in zip((self.k_pool, self.v_pool), cut_pages(k, v, index[:3], self.page_size), strict=True):
            assert pool is not None
            pool.index_copy_(0, index[3, :, 0], x)
        self.is_initialized = True

    def reset(self) -> None:
        """Forgets everything, and keeps every tensor where it is: a captured step goes on with the next prompt."""
        self.is_initialized, self.route, self.waiting = False, None, False
        self._context, self._prompt, self._host_route = None, None, None
        if self.k_pool is not None:
            for t in (self.seen, self.kv_len, self.slots):
                t.zero_()

    def stored(self) -> KeyValues:
        """What is stored; its tensors are the same at every step."""
        assert self.k_pool is not None
        return KeyValues(self.k_pool, self.v_pool, end=self.kv_len, page_table=self.table)

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

    def check_crop(self, tokens_to_remove: int) -> None:
        raise ValueError("FluxStaticCache cannot be cropped: use FluxCache for assisted decoding")

    def select(self, sequences: np.ndarray) -> None:
        if self.is_initialized:
            raise ValueError("FluxStaticCache cannot reorder sequences: use FluxCache for beam search")

    def stored_tokens(self) -> np.ndarray:
        seen, ring = self.seen.cpu().numpy().astype(np.int64), self.ring.cpu().numpy()
        stored: np.ndarray = seen - self._gap(seen, ring)
        return stored

    def nbytes(self) -> int:
        return 0 if self.k_pool is None else self.k_pool.nbytes + self.v_pool.nbytes

    def dense_nbytes(self) -> int:
        """Bytes of a dense cache with as much room."""
        if self.k_pool is None:
            return 0
        widths = self.k_pool.shape[-1] + self.v_pool.shape[-1]
        return self.base.numel() * self.max_cache_len * widths * self.dtype.itemsize


class FluxStaticCache(FluxCache):
    """A :class:`~flux_ext.FluxCache` of fixed size for compiled decoding and CUDA graphs.

    ``generate(cache_implementation="static")`` makes one. A KV head that is routed full has room for ``max_cache_len``
    tokens, a sparse one for the sink and the window. For greedy decoding and sampling; every layer must have full
    attention.

    Args:
        config, flux, page_size: as for FluxCache.
        max_cache_len: tokens per sequence, prompt and padding included. A token more is a ValueError on the CPU;
            on CUDA and in a compiled step a check would wait for the device, so there the logits of a sequence that
            has no room left become NaN.
        any_routes: allocate as if everything were routed full, so that after :meth:`reset` a prompt of any routes fits.

    A mask must cover all slots so far, at least; the step's own column says which sequences have a token. Where it
    shows more or fewer earlier tokens than are stored, that is a ValueError on the CPU and NaN on CUDA and in a
    compiled step. A captured step reads the mask where it was: write into that one, ``[B,
    max_cache_len]``, from step to step.
    """

    def __init__(
        self, config: Any, flux: FluxConfig, max_cache_len: int, page_size: int = 64, any_routes: bool = False
    ) -> None:
        for name, n in (("page_size", page_size), ("max_cache_len", max_cache_len)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {n}")
        stock = stock_cache_layers(config)
        if others := [i for i, layer in enumerate(stock) if type(layer) is not DynamicLayer]:
            raise ValueError(f"FluxStaticCache needs full attention in every layer, {others} have not: use FluxCache")
        routed = flux.layers_to_route
        layers: list[Any] = [
            FluxStaticCacheLayer(flux, page_size, routed is None or i in routed, max_cache_len, any_routes)
            for i in range(len(stock))
        ]
        Cache.__init__(self, layers=layers)
        self.flux, self.prompt_len, self.unfinished, self.history, self._empty = flux, None, False, History(), {}

    def check_batch(self, batch_size: int) -> None:
        super().check_batch(batch_size)
        layers: list[Any] = list(self.layers)
        if any(layer.is_initialized != layers[0].is_initialized for layer in layers):
            raise RuntimeError(FAILED)

    def active(self, mask: Tensor) -> Tensor:
        """int32 ``[B]`` of a step, as ``append`` takes it, from a mask, bool ``[B, slots or more]``.

        Raises:
            ValueError: the mask contradicts what is stored, where no wait for the device is needed to see it.
        """
        layer: Any = self.layers[0]
        slots, stored = layer.slots.to(mask.device), layer.seen[:, 0].to(mask.device)
        width = mask.shape[1]
        now = mask.index_select(1, slots.clamp(max=width - 1).view(1))[:, 0]
        agrees = (mask & (torch.arange(width, device=mask.device) < slots)).sum(1) == stored
        if mask.device.type == "cpu" and not torch.compiler.is_compiling():
            if width <= int(slots):
                raise ValueError(f"attention_mask must cover all {int(slots) + 1} tokens, got {list(mask.shape)}")
            if not bool(agrees.all()):
                raise ValueError(
                    f"attention_mask shows other tokens of sequence {int((~agrees).int().argmax())} than were stored: "
                    "FluxStaticCache cannot take back what was fed, use FluxCache"
                )
        return torch.where(agrees, now.to(torch.int32), -1)

    def reset(self) -> None:
        """Forgets everything and keeps every address, so that a captured step goes on with the next prompt.

        That prompt must have as many sequences as the first, and its routes must not need more pages than those of
        the first were given (see ``any_routes``): otherwise its forward raises a ValueError.
        """
        super().reset()
