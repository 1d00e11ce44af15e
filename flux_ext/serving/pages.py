"""vLLM's pages as this package's operators take them: strided views, nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor


def pages_of(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[num_pages, page_size, Hkv, D]`` as views of a layer's cache, whatever its order in memory.

    Args:
        kv_cache: ``[num_pages, Hkv, page_size, 2 * D]``, in any order but with the last dimension contiguous; keys
            stand before values in each row.
    """
    rows, width = kv_cache.transpose(1, 2), kv_cache.shape[-1] // 2
    return rows[..., :width], rows[..., width:]


def store(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Writes a step's keys and values into their pages, without waiting for the device.

    Args:
        k, v: ``[T, Hkv, D]``.
        k_pages, v_pages: as :func:`pages_of` gives them.
        slots: ``[T]``, for each token ``page * page_size`` plus its place in the page; negative for rows of padding,
            which go to page 0, no request's.
    """
    slots = slots.clamp(min=0)
    page_size = k_pages.shape[1]
    if k_pages.stride(0) == page_size * k_pages.stride(1):  # a page follows the other as a token does: fewer launches
        for pages, x in ((k_pages, k), (v_pages, v)):
            pages.view(-1, *pages.shape[2:])[slots] = x.to(pages.dtype)
        return
    where = torch.div(slots, page_size, rounding_mode="floor"), slots % page_size
    k_pages[where] = k.to(k_pages.dtype)
    v_pages[where] = v.to(v_pages.dtype)
