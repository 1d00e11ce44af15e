"""What one step of a worker computes, and what all of its layers share of it. Nothing here knows vLLM.

A step computes new tokens of many requests, packed, each with its keys and values in pages: whole prompts, chunks of
prompts and single tokens side by side. Where prompts are among them the host knows every row (:class:`PromptStep`).
Where there are none, which is most of the time, lengths, routes and pages stay tensors (:class:`AnswerStep`): nothing
waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import FluxConfig
from ..operators.patterns import Streaming
from .requests import Request, Requests, Route
from .visible_pages import Span, hidden, hidden_pages, split


class Row(NamedTuple):
    """The tokens ``[begin, end)`` of a request that a step computes, rows ``[q_begin, q_end)`` of the packed ones."""

    request: Request | None
    q_begin: int
    q_end: int
    begin: int
    end: int


class Plan(NamedTuple):
    """How the tokens of a step attend in the layers that route its requests alike: sequences of one route each.

    Attributes:
        route: int32 ``[S]`` or ``[S, Hkv]``.
        cu_seqlens: int32 ``[S + 1]``, their queries.
        kv_len: int32 ``[S]``, the keys before and among them.
        places: int64 ``[S, max_pages]``, where in a flattened page table their pages stand; None: just as they do
            there. A page that no head sees is replaced by the request's first one: it may be another request's by now,
            and a kernel loads blocks of keys before it masks them.
    """

    route: Tensor
    cu_seqlens: Tensor
    kv_len: Tensor
    places: Tensor | None

    def visible(self, page_table: Tensor) -> Tensor:
        """int32 ``[S, max_pages]``, the pages that the sequences see."""
        return page_table if self.places is None else page_table.reshape(-1)[self.places]


class PromptStep:
    """A step with prompts, or chunks of them.

    Attributes:
        rows: one per request.
    """

    def __init__(self, rows: list[Row], pattern: Streaming, last_q: int) -> None:
        self.rows = rows
        self._pattern, self._last_q = pattern, last_q
        self._plans: dict[tuple[Route, ...], Plan | None] = {}

    def plan(self, layer: int, page_size: int, page_table: Tensor) -> Plan | None:
        """How tokens attend in a layer, which has decided its routes; made once for all layers of the same ones. None
        where the step has no tokens.

        Raises:
            RuntimeError: a prompt is complete and the layer has not: its router was never asked.
        """
        for row in self.rows:
            if row.request is not None and row.end >= row.request.prompt_len and layer not in row.request.routes:
                raise RuntimeError(f"the router of layer {layer} did not see the prompt of request {row.request.name}")
        routes = tuple(_route_of(row.request, layer) for row in self.rows)
        if routes not in self._plans:
            self._plans[routes] = self._make(routes, page_size, page_table.shape[1], page_table.device)
        return self._plans[routes]

    def _make(self, routes: tuple[Route, ...], page_size: int, width: int, device: torch.device) -> Plan | None:
        heads = max(map(len, routes), default=1)
        lengths, ends, chosen, gaps = [0], [], [], []
        for i, (row, decided) in enumerate(zip(self.rows, routes, strict=True)):
            for span in self._spans(row, decided):
                of_span = decided if span.sparse else (0,)
                lengths.append(span.end - span.begin)
                ends.append(span.end)
                chosen.append(of_span * (heads // len(of_span)))
                gaps.append((i, *(hidden(self._pattern, span.begin, page_size) if all(of_span) else (0, 0))))
        if not ends:
            return None
        route, cu_seqlens, kv_len = (
            torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (chosen, lengths, ends)
        )
        places = None
        if len(ends) != len(self.rows) or any(first < last for _, first, last in gaps):
            owner, first, last = torch.tensor(gaps, device=device).T[:, :, None]
            page = torch.arange(width, device=device)
            places = page.masked_fill((page >= first) & (page < last), 0) + owner * width
        if heads == 1:
            route = route[:, 0]
        return Plan(route, cu_seqlens.cumsum(0, dtype=torch.int32), kv_len, places)

    def _spans(self, row: Row, route: Route) -> list[Span]:
        if row.q_begin == row.q_end:
            return []
        request = row.request
        if request is None or request.dense_until is None or not any(route):
            return [Span(row.begin, row.end, False)]
        return split(row.begin, row.end, request.dense_until, request.prompt_len, self._last_q)


class AnswerStep:
    """A step that computes one token of each request, after its prompt.

    Attributes:
        kv_len: int32 ``[B]``, tokens of each request up to that one; 0 for rows of padding.
    """

    def __init__(self, kv_len: Tensor, pattern: Streaming) -> None:
        self.kv_len = kv_len
        self._pattern = pattern
        self._hidden: Tensor | None = None

    def hidden(self, page_size: int, max_pages: int) -> Tensor:
        """bool ``[B, max_pages]``, the pages out of sight of a sparse layer; worked out once for all layers."""
        if self._hidden is None:
            self._hidden = hidden_pages(self._pattern, self.kv_len - 1, page_size, max_pages)
        return self._hidden


Step = PromptStep | AnswerStep


class Steps:
    """Makes the steps of a worker, each once for all of its layers: their page tables differ, their requests do not."""

    def __init__(self, requests: Requests, config: FluxConfig) -> None:
        self.requests = requests
        self.pattern = config.streaming()
        self.last_q = config.last_q if config.pattern == "triangle" else 0
        self._last: tuple[int, Tensor, Tensor] | None = None
        self._step: Step

    def step(self, group: int, cu_seqlens: Tensor, kv_len: Tensor, page_table: Tensor, longest: int) -> Step:
        """From what vLLM's runner hands to attention.

        Args:
            group: of layers that share the page table.
            cu_seqlens, kv_len, page_table: int32 ``[B + 1]``, ``[B]`` and ``[B, max_pages]``. Read by the host where
                the step has prompts, which waits for the device.
            longest: the most tokens that it computes of one request.
        """
        last = self._last
        if last is None or last[0] != self.requests.steps or last[1] is not cu_seqlens or last[2] is not kv_len:
            self._last = self.requests.steps, cu_seqlens, kv_len
            if self.requests.only_answers and longest == 1:
                self._step = AnswerStep(kv_len, self.pattern)
            else:
                rows = rows_of(self.requests, group, cu_seqlens, kv_len, page_table)
                self._step = PromptStep(rows, self.pattern, self.last_q)
        return self._step


def rows_of(requests: Requests, group: int, cu_seqlens: Tensor, kv_len: Tensor, page_table: Tensor) -> list[Row]:
    """The rows of a step, read from the device; arguments as for :meth:`Steps.step`."""
    bounds, lengths = cu_seqlens.tolist(), kv_len.tolist()
    first_pages = page_table[: len(lengths), 0].tolist()
    owners = [requests.at(group, page) if requests.announced else None for page in first_pages]
    return [
        Row(request, q_begin, q_end, end - (q_end - q_begin), end)
        for request, q_begin, q_end, end in zip(owners, bounds[:-1], bounds[1:], lengths, strict=True)
    ]


def _route_of(request: Request | None, layer: int) -> Route:
    """All full where nothing is decided."""
    return (0,) if request is None else request.routes.get(layer, (0,))
