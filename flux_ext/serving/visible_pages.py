"""Which tokens and pages of a request a sparse layer sees: arithmetic that scheduler and worker share."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators.patterns import Streaming


class Span(NamedTuple):
    """Tokens ``[begin, end)`` of a request, computed in one step and all attending in one way."""

    begin: int
    end: int
    sparse: bool


def split(begin: int, end: int, dense_until: int, prompt_len: int, last_q: int) -> list[Span]:
    """How tokens ``[begin, end)`` of a request with a sparse route attend, as few spans as possible.

    Tokens before ``dense_until`` (chunks of the prompt that came before the route was known) and the last ``last_q``
    ones of the prompt (:class:`flux_ext.Triangle`) see everything, all others sink and window. It depends on nothing
    but positions: a request that is computed anew, in whatever chunks, attends as it did at first.
    """
    edges = sorted({begin, end} | {x for x in (dense_until, prompt_len - last_q, prompt_len) if begin < x < end})
    spans: list[Span] = []
    for low, high in pairwise(edges):
        sparse = low >= dense_until and not prompt_len - last_q <= low < prompt_len
        if spans and spans[-1].sparse == sparse:
            low = spans.pop().begin
        spans.append(Span(low, high, sparse))
    return spans


def hidden(pattern: Streaming, position: int, page_size: int) -> tuple[int, int]:
    """Pages ``[first, last)`` of which a sparse query at ``position`` sees no key, nor does any later one.

    The first page of a request never is among them: it says whose request it is.
    """
    first = max(1, -(-pattern.sink // page_size))
    return first, max(first, pattern.window_begin(position) // page_size)


def hidden_pages(pattern: Streaming, positions: Tensor, page_size: int, max_pages: int) -> Tensor:
    """:func:`hidden` for many positions ``[B]``, on their device: bool ``[B, max_pages]``."""
    pages = torch.arange(max_pages, dtype=positions.dtype, device=positions.device)
    last = torch.div(pattern.window_begin(positions), page_size, rounding_mode="floor")
    return (pages >= max(1, -(-pattern.sink // page_size))) & (pages < last[:, None])
