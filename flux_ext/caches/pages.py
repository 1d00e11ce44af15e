"""Keys and values in pages: tensors on the device, books on the host.

Every sequence head (one KV head of one sequence) has a length of its own. They share one pool of pages, and give pages
back when tokens are dropped; what a page holds moves only when the pool shrinks or sequences are selected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..operators import KeyValues

HOST_INDICES = 4096
"""Up to this many tokens, indices are computed on the host and sent in one copy."""
STEPS_AHEAD = 64
"""For at most so many steps of one token, what they need to know on the device is sent in one copy."""


def cut_pages(k: Tensor, v: Tensor, source: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Pages of a prompt's keys and values, ``[n, page_size, 1, D]`` each, in v's dtype.

    A page's tokens follow each other, so one number says where they are: ``k[b, h, first:]``. The unused end of a page
    gets what follows there.

    Args:
        k, v: ``[B, Hkv, S, D]``.
        source: int64 ``[3, n, 1]``: b, h and first.
    """
    b, h, first = source.unbind()
    row = (first + torch.arange(page_size, device=first.device)).clamp_(max=k.shape[2] - 1)
    keys, values = (x[b, h, row].to(v.dtype).unsqueeze(2) for x in (k, v))
    return keys, values


def normal(x: Any) -> Any:
    """A tensor made in inference mode as one that works in and out of it; anything else as it is."""
    if isinstance(x, Tensor) and x.is_inference():
        with torch.inference_mode(False):
            return x.clone()
    return x


class PagedKeyValues:
    """Keys and values ``[num_pages, page_size, 1, D]`` of ``B * Hkv`` sequence heads.

    Arrays are over them: number ``b * Hkv + h`` is KV head ``h`` of sequence ``b``.

    Args:
        batch_size, num_heads: B and Hkv.
        page_size: tokens per page.
        k, v: tensors ``[..., D]`` whose D and device the pools get, and v's dtype.
    """

    def __init__(self, batch_size: int, num_heads: int, page_size: int, k: Tensor, v: Tensor) -> None:
        self.num_heads, self.page_size = num_heads, page_size
        count = batch_size * num_heads
        self.length = np.zeros(count, np.int64)  # tokens stored
        self.held = np.zeros(count, np.int64)  # pages held
        self.table = np.zeros((count, 0), np.int32)  # page numbers in order; of each line the first `held` count
        self.free = np.zeros(0, np.int32)  # page numbers that nobody holds
        # Made outside inference mode, here and below, pools can be written to in and out of it.
        with torch.inference_mode(False):
            self.keys = v.new_empty((0, page_size, 1, k.shape[-1]))
            self.values = v.new_empty((0, page_size, 1, v.shape[-1]))
        self._device_table: Tensor | None = None
        # What is on the device of `_counted`, which is `length` unless that changed: it, and of the steps to come, last
        # first, the rows of the pools that the new tokens go to and the length that there is then.
        self._counted: np.ndarray | None = None
        self._kv_len: Tensor | None = None
        self._steps: list[tuple[Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counted": None, "_kv_len": None, "_steps": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may be made in inference mode.
        self.__dict__ = {name: normal(x) for name, x in state.items()}

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.length) // self.num_heads

    def nbytes(self) -> int:
        """Bytes of the pools, free pages included."""
        return self.keys.nbytes + self.values.nbytes

    def page_table(self) -> Tensor:
        """int32 ``[B, Hkv, max_pages]`` on the device."""
        if self._device_table is None:
            with torch.inference_mode(False):
                table = self.table.reshape(self.batch_size, self.num_heads, self.table.shape[1])
                self._device_table = torch.from_numpy(table.copy()).to(self.keys.device, non_blocking=True)
        return self._device_table

    def kv_len(self) -> Tensor:
        """int32 ``[B, Hkv]`` on the device: tokens stored."""
        if self._counted is self.length and self._kv_len is not None:
            return self._kv_len
        length = torch.from_numpy(self.length.astype(np.int32)).view(-1, self.num_heads)
        return length.to(self.keys.device, non_blocking=True)

    def stored(self) -> KeyValues:
        """What attention is given: everything stored."""
        return KeyValues(self.keys, self.values, end=self.kv_len(), page_table=self.page_table())

    def fill(self, k: Tensor, v: Tensor, count: np.ndarray, begin: np.ndarray, skip: np.ndarray, skip_at: int) -> None:
        """Stores the first ``count`` tokens of each sequence head, in pools that are made of them.

        They come from ``k[b, h, begin:]``; those from the ``skip_at``-th on come from ``skip`` tokens further on: what
        lies between is left out.

        Args:
            k, v: ``[B, Hkv, S, D]``.
            count, begin, skip: int64 ``[B * Hkv]``.
            skip_at: whole pages, as ``skip`` is.
        """
        self.length, self.held = count, -(-count // self.page_size)
        columns = np.arange(self.held.max(initial=0))
        held = columns < self.held[:, None]
        self.table = np.zeros(held.shape, np.int32)
        self.table[held] = np.arange(self.held.sum(), dtype=np.int32)
        place = columns * self.page_size
        first = begin[:, None] + place + (place >= skip_at) * skip[:, None]
        seq_head = held.nonzero()[0]
        index = np.array([seq_head // self.num_heads, seq_head % self.num_heads, first[held]])
        with torch.inference_mode(False):
            sent = torch.from_numpy(index[..., None]).to(self.keys.device, non_blocking=True)
            self.keys, self.values = cut_pages(k, v, sent, self.page_size)

    def append(self, k: Tensor, v: Tensor, count: np.ndarray, begin: np.ndarray) -> None:
        """Stores ``count`` new tokens of each sequence head, from ``k[b, h, begin:]``.

        Args:
            k, v: ``[B, Hkv, S, D]``.
            count, begin: int64 ``[B * Hkv]``.
        """
        first = self.length
        self._allocate(first + count)
        self.length = first + count
        total = int(count.sum())
        device = self.keys.device if total > HOST_INDICES else torch.device("cpu")

        def spread(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)[seq_head]

        # One entry per new token: whose it is, where it comes from, where it goes.
        seq_head = torch.repeat_interleave(
            torch.arange(len(count), device=device), torch.from_numpy(count).to(device), output_size=total
        )
        index = torch.arange(total, device=device) - spread(np.cumsum(count) - count)
        stored = index + spread(first)
        source = index + spread(begin)
        page = torch.from_numpy(self.table).to(device)[seq_head, stored // self.page_size]
        target = page.long() * self.page_size + stored % self.page_size
        index = torch.stack([seq_head // self.num_heads, seq_head % self.num_heads, source, target])
        b, h, row, target = index.to(self.keys.device, non_blocking=True).unbind()
        for pool, x in ((self.keys, k), (self.values, v)):
            pool.view(-1, pool.shape[-1]).index_copy_(0, target, x[b, h, row].to(pool.dtype))

    def append_one(self, k: Tensor, v: Tensor) -> None:
        """Stores one new token ``[B, Hkv, 1, D]`` of every sequence head.

        Called for every layer and token, so what counts is how few things the host does. Until a page is full, where
        the tokens go and how many are stored is on the device already: nothing is sent.
        """
        if self._counted is not self.length or not self._steps:
            self._look_ahead()
        rows, self._kv_len = self._steps.pop()
        self.length = self._counted = self.length + 1
        for pool, x in ((self.keys, k), (self.values, v)):
            width = pool.shape[-1]
            pool.view(-1, width).index_copy_(0, rows, x.reshape(-1, width).to(pool.dtype))

    def _look_ahead(self) -> None:
        """Sends what :meth:`append_one` needs until a page is full."""
        self._allocate(self.length + 1)
        steps = min(int((self.held * self.page_size - self.length).min()), STEPS_AHEAD)
        length = self.length + np.arange(steps)[:, None]
        page = self.table[np.arange(len(self.length)), self.length // self.page_size].astype(np.int64)
        rows = page * self.page_size + length % self.page_size  # [steps, B * Hkv], like the lengths
        # As one array: int64 rows as pairs of int32, then int32 lengths.
        numbers = np.concatenate([rows.reshape(-1).view(np.int32), (length + 1).astype(np.int32).reshape(-1)])
        with torch.inference_mode(False):
            sent = torch.from_numpy(numbers).to(self.keys.device, non_blocking=True)
            row, kv_len = sent[: 2 * rows.size].view(torch.int64), sent[2 * rows.size :]
            each = zip(row.view(steps, -1).unbind(), kv_len.view(steps, -1, self.num_heads).unbind(), strict=True)
            self._steps = list(each)[::-1]

    def _allocate(self, length: np.ndarray) -> None:
        """Gives every sequence head the pages for ``length [B * Hkv]`` tokens."""
        needed = -(-length // self.page_size)
        more = np.maximum(needed - self.held, 0)
        total = int(more.sum())
        if not total:
            return
        if total > len(self.free):
            # Those that keep everything go on growing: a little ahead saves copies of the pool.
            self._enlarge(max(total - len(self.free), int(self.held.sum()) // 16))
        held = self.held + more
        if held.max() > self.table.shape[1]:
            table, self.table = self.table, np.zeros((len(held), held.max()), np.int32)
            self.table[:, : table.shape[1]] = table
        columns = np.arange(self.table.shape[1])
        fresh = (columns >= self.held[:, None]) & (columns < held[:, None])
        self.table[fresh] = self.free[:total]
        self.free = self.free[total:]
        self.held = held
        self._device_table = None

    @torch.inference_mode(False)
    def _enlarge(self, pages: int) -> None:
        old = len(self.keys)
        for name in ("keys", "values"):
            pool = getattr(self, name)
            setattr(self, name, torch.cat([pool, pool.new_empty((pages, *pool.shape[1:]))]))
        self.free = np.concatenate([self.free, np.arange(old, old + pages, dtype=np.int32)])

    def drop(self, first_page: int, pages: np.ndarray) -> None:
        """Takes ``pages [B * Hkv]`` whole pages out of each sequence head's, from ``first_page`` on."""
        if not pages.any():
            return
        columns = np.arange(self.table.shape[1])
        gone = (columns >= first_page) & (columns < first_page + pages[:, None])
        self.free = np.concatenate([self.free, self.table[gone]])
        source = columns + np.where(columns >= first_page, pages[:, None], 0)
        self.table = np.take_along_axis(self.table, np.minimum(source, self.table.shape[1] - 1), 1)
        self.held = self.held - pages
        self.length = self.length - pages * self.page_size
        self._changed()

    def truncate(self, length: np.ndarray) -> None:
        """Forgets each sequence head's tokens from ``length [B * Hkv]`` on."""
        keep = -(-length // self.page_size)
        columns = np.arange(self.table.shape[1])
        gone = (columns >= keep[:, None]) & (columns < self.held[:, None])
        self.free = np.concatenate([self.free, self.table[gone]])
        self.held, self.length = keep, length
        self._changed()

    def remove(self, stored: dict[int, np.ndarray]) -> None:
        """Takes single tokens out, by sequence head and place among its stored tokens; those behind them move up."""
        length, moved = self.length.copy(), [np.zeros((2, 0), np.int64)]
        for seq_head, gone in stored.items():
            kept = np.setdiff1d(np.arange(self.length[seq_head]), gone)
            length[seq_head] = len(kept)
            index = np.stack([kept, np.arange(len(kept))])[:, kept != np.arange(len(kept))]  # from where, to where
            pages = self.table[seq_head].astype(np.int64)[index // self.page_size]
            moved.append(pages * self.page_size + index % self.page_size)
        source, place = torch.from_numpy(np.concatenate(moved, 1)).to(self.keys.device)
        for pool in (self.keys, self.values) if len(source) else ():
            tokens = pool.view(-1, pool.shape[-1])
            tokens.index_copy_(0, place, tokens[source])
        self.truncate(length)

    def select(self, sequences: np.ndarray) -> None:
        """Keeps the given sequences, in this order, repeated where they repeat."""
        chosen = (sequences[:, None] * self.num_heads + np.arange(self.num_heads)).reshape(-1)
        self.table, self.held, self.length = self.table[chosen], self.held[chosen], self.length[chosen]
        self._compact()

    def _changed(self) -> None:
        self.table = self.table[:, : int(self.held.max(initial=0))]
        self._device_table = self._counted = None
        if len(self.free) > len(self.held) + int(self.held.sum()) // 8:
            self._compact()

    @torch.inference_mode(False)
    def _compact(self) -> None:
        """New pools of exactly the pages held, each sequence head's in order."""
        self.table = self.table[:, : int(self.held.max(initial=0))]
        used = np.arange(self.table.shape[1]) < self.held[:, None]
        source = torch.from_numpy(self.table[used].astype(np.int64)).to(self.keys.device)
        self.keys, self.values = self.keys[source], self.values[source]
        self.table = np.zeros_like(self.table)
        self.table[used] = np.arange(len(source), dtype=np.int32)
        self.free = np.zeros(0, np.int32)
        self._device_table = self._counted = None
