"""One layer of a served model: its router, and its attention over pages. Nothing here knows vLLM.

A step computes new tokens of many requests, packed, each with its keys and values in pages: whole prompts, chunks of
prompts and single tokens side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..config import FluxConfig
from ..operators.patterns import Full
from ..routers.modules import Router
from .requests import Request, Requests
from .visible_pages import Span, hidden, split


class Row(NamedTuple):
    """The tokens ``[begin, end)`` of a request that a step computes, rows ``[q_begin, q_end)`` of the packed ones."""

    request: Request | None
    q_begin: int
    q_end: int
    begin: int
    end: int


@dataclass
class Step:
    """What one step computes, for the layers of one group.

    Attributes:
        rows: one per request.
        page_table: int32 ``[len(rows), max_pages]``.
    """

    rows: list[Row]
    page_table: Tensor

    @classmethod
    def of(cls, requests: Requests, group: int, cu_seqlens: Tensor, kv_len: Tensor, page_table: Tensor) -> Step:
        """From what vLLM's runner hands to attention, int32 ``[B + 1]``, ``[B]`` and ``[B, max_pages]``: waits for
        the device."""
        bounds, lengths = cu_seqlens.tolist(), kv_len.tolist()
        owners = [requests.at(group, page) for page in page_table[: len(lengths), 0].tolist()]
        rows = []
        for request, q_begin, q_end, end in zip(owners, bounds[:-1], bounds[1:], lengths, strict=True):
            rows.append(Row(request, q_begin, q_end, end - (q_end - q_begin), end))
        return cls(rows, page_table[: len(lengths)])


def refuse_modes(settings: FluxConfig) -> None:
    """ValueError where routers choose between modes of attention that are not served."""
    for name, served in (("full", ("full",)), ("pattern", ("streaming", "triangle")), ("decode", ("sparse",))):
        if (mode := getattr(settings, name)) not in served:
            raise ValueError(f"routers with {name}={mode!r} are not served: {name} must be one of {served}")


class RoutedLayer:
    """Routes and attends for one attention layer of a model.

    Args:
        index: of the layer in the model.
        router: of the layer, on its device.
        config: the routers' settings.
        requests: those of the worker.

    Attributes:
        group: of the layers that share page tables with this one; known once vLLM has laid out its memory.
    """

    def __init__(self, index: int, router: Router, config: FluxConfig, requests: Requests) -> None:
        self.index, self.router, self.requests = index, router, requests
        self.pattern = config.streaming()
        self.last_q = config.last_q if config.pattern == "triangle" else 0
        self.group: int | None = None

    def see(self, states: Tensor, step: Step) -> None:
        """Decides the routes of the requests whose prompts this step completes, and remembers of the others what
        their router will pool.

        Args:
            states: ``[T, H, D]``, the new tokens' queries (per-head routers: keys) before the rotary embedding.
        """
        whole: list[Row] = []
        for row in step.rows:
            if row.request is None or self.index in row.request.routes or row.q_begin == row.q_end:
                continue
            if row.begin == 0 and row.end >= row.request.prompt_len:
                whole.append(row)
            else:
                self._see_chunk(states[row.q_begin : row.q_end], row, row.request)
        if whole:
            begin, end = (
                torch.tensor(bounds, dtype=torch.int32, device=states.device)
                for bounds in ([row.q_begin for row in whole], [row.q_end for row in whole])
            )
            for row, route in zip(whole, self.router.decide(states, begin, end)[1].tolist(), strict=True):
                self._decide(row, route)

    def _see_chunk(self, states: Tensor, row: Row, request: Request) -> None:
        """A chunk of a prompt. Of longer prompts the first and the last ``pool_size`` rows are kept: their mean over
        both ends is that of the whole prompt."""
        earlier = request.rows.get(self.index)
        rows = states if earlier is None else torch.cat([earlier, states])
        size = self.router.pool_size
        if len(rows) > 2 * size:
            rows = torch.cat([rows[:size], rows[-size:]])
        elif earlier is None:
            rows = rows.clone()  # the runner's buffer is another step's soon
        request.rows[self.index] = rows
        if row.end >= request.prompt_len:
            self._decide(row, self.router.decide(rows[None])[1][0].tolist())

    def _decide(self, row: Row, route: int | list[int]) -> None:
        assert row.request is not None
        routes = tuple(route) if isinstance(route, list) else (route,)
        self.requests.decide(row.request, self.index, routes, row.begin)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, step: Step, scale: float) -> Tensor:
        """Attention of a step's tokens, whose own keys and values are in the pages already.

        Args:
            q: ``[T, Hq, D]``, packed.
            k_pages, v_pages: ``[num_pages, page_size, Hkv, D]``, any strides with the last dimension contiguous.

        Returns:
            ``[T, Hq, D]``.
        """
        lengths, ends, routes, tables = [0], [], [], []
        for i, row in enumerate(step.rows):
            for span in self._spans(row):
                lengths.append(span.end - span.begin)
                ends.append(span.end)
                routes.append(row.request.routes[self.index] if span.sparse and row.request else (0,))
                tables.append(self._visible(step.page_table[i], span, routes[-1], k_pages.shape[1]))
        if not ends:
            return torch.zeros_like(q)
        heads = max(map(len, routes))
        route = torch.tensor([r * (heads // len(r)) for r in routes], dtype=torch.int32, device=q.device)
        cu_seqlens, kv_len = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in (lengths, ends))
        kv = operators.KeyValues(k_pages, v_pages, end=kv_len, page_table=torch.stack(tables))
        routing = operators.Routing(route[:, 0] if heads == 1 else route, Full(), self.pattern)
        return operators.attend(q, kv, routing, scale, cu_seqlens.cumsum(0, dtype=torch.int32))[0]

    def _spans(self, row: Row) -> list[Span]:
        if row.q_begin == row.q_end:
            return []
        request = row.request
        if request is None or request.dense_until is None or not any(request.routes.get(self.index, ())):
            return [Span(row.begin, row.end, False)]
        return split(row.begin, row.end, request.dense_until, request.prompt_len, self.last_q)

    def _visible(self, table: Tensor, span: Span, route: tuple[int, ...], page_size: int) -> Tensor:
        """The page table without pages that no head sees: they may be another request's by now, and a kernel loads
        blocks of keys before it masks them. The request's first page stands in for them."""
        if not all(route):
            return table
        first, last = hidden(self.pattern, span.begin, page_size)
        if first >= last:
            return table
        return torch.cat([table[:first], table[:1].expand(last - first), table[last:]])
