"""What a worker knows of the requests it serves: where their prompts end, and their routes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Route = tuple[int, ...]
"""Of one request in one layer, 0 full or 1 sparse: one number, or one per KV head."""
NULL_PAGE = 0
"""The page that belongs to no request: what vLLM's rehearsals, without requests, have in their tables."""


@dataclass
class Request:
    """One request, as long as it lives; preempted and computed anew it is the same.

    Attributes:
        prompt_len: tokens of the prompt.
        first_pages: the request's first page in each group of layers that share page tables. It is never given back
            while the request runs, so it tells whose a row of a page table is.
        dense_until: where the chunk began with which the prompt was complete and the routes were decided; the tokens
            before attended fully. None: not decided yet.
        routes: per layer.
        rows: per layer, states of the prompt's tokens so far that its router will pool, ``[n, H, D]``.
    """

    name: str
    prompt_len: int
    first_pages: tuple[int, ...]
    dense_until: int | None = None
    routes: dict[int, Route] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def is_sparse(self, layer: int) -> bool:
        """Whether all of a layer is routed sparse, so that the pages that are out of sight are needed no more."""
        return all(self.routes.get(layer, (0,)))


class RouteTable:
    """Routes on a device, by the first page of a request's layer, which is no other's: pages are those of one pool.

    Args:
        num_pages: of the pool.
        heads: numbers of one route, 1 or the KV heads.
    """

    def __init__(self, num_pages: int, heads: int, device: torch.device | str) -> None:
        self._routes = torch.zeros(num_pages, heads, dtype=torch.int32, device=device)

    def write(self, routes: dict[int, Route]) -> None:
        """Routes by first page, from the host: once for each request that was decided or got new pages."""
        pages, numbers = (torch.tensor(list(x)).to(self._routes.device) for x in (routes.keys(), routes.values()))
        self._routes[pages] = numbers.to(torch.int32)

    def at(self, pages: Tensor) -> Tensor:
        """int32 ``[B, heads]``, of the requests whose first pages these are ``[B]``; full for :data:`NULL_PAGE`."""
        return self._routes.index_select(0, pages)


class Requests:
    """The requests of one worker, found by name or by their first page.

    Attributes:
        groups: of layers that share page tables, by the routed layers in them; known once vLLM has laid out its memory,
            as is the table.
        table: the routes on the device. What is decided is written before the next step, outside of what a CUDA graph
            captures: a step of answers only reads it.
        steps: how many there were.
        announced: whether the step that runs was announced. What is not is a rehearsal of the runner: its page tables
            may name pages, but no request's.
        only_answers: whether every token of the step comes after its request's prompt.
    """

    def __init__(self) -> None:
        self.groups: dict[int, int] = {}
        self.table: RouteTable | None = None
        self.steps = 0
        self.announced = False
        self.only_answers = False
        self._unwritten: dict[int, Route] = {}
        self._by_name: dict[str, Request] = {}
        self._by_page: dict[tuple[int, int], Request] = {}
        self._decided: list[Request] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_name.values())

    def begin(self, name: str, prompt_len: int, first_pages: Sequence[int]) -> None:
        """A request is scheduled for the first time, or again after it was preempted, with pages of its own.

        One that had its routes keeps them; of one that had not, the prompt is seen anew.
        """
        known = self._by_name.get(name)
        if known is None:
            known = self._by_name[name] = Request(name, prompt_len, ())
        self._forget_pages(known)
        known.first_pages = tuple(first_pages)
        known.rows.clear()
        for key in enumerate(known.first_pages):
            self._by_page[key] = known
        for layer, route in known.routes.items():
            self._write(known, layer, route)

    def end(self, name: str) -> None:
        """A request is finished or was given up."""
        if (request := self._by_name.pop(name, None)) is not None:
            self._forget_pages(request)

    def _forget_pages(self, request: Request) -> None:
        for key in enumerate(request.first_pages):
            if self._by_page.get(key) is request:  # of a preempted request another one may have the page by now
                del self._by_page[key]

    def at(self, group: int, page: int) -> Request | None:
        """The request whose first page in a group of layers this is; None for :data:`NULL_PAGE`.

        Raises:
            RuntimeError: it is no request's.
        """
        if page == NULL_PAGE:
            return None
        if (request := self._by_page.get((group, page))) is None:
            raise RuntimeError(f"page {page} of group {group} is the first of no request that was announced")
        return request

    def decide(self, request: Request, layer: int, route: Route, dense_until: int) -> None:
        """A layer's route, once per request.

        Raises:
            RuntimeError: it has one.
        """
        if layer in request.routes:
            raise RuntimeError(f"layer {layer} of request {request.name} has a route: it is decided once")
        if request.dense_until is None:
            request.dense_until = dense_until
            self._decided.append(request)
        request.routes[layer] = route
        request.rows.pop(layer, None)
        self._write(request, layer, route)

    def _write(self, request: Request, layer: int, route: Route) -> None:
        if layer in self.groups:
            self._unwritten[request.first_pages[self.groups[layer]]] = route

    def routes_at(self, pages: Tensor) -> Tensor:
        """:meth:`RouteTable.at` of what was decided before the step."""
        assert self.table is not None, "the pool of pages is not laid out yet"
        return self.table.at(pages)

    def next_step(self, only_answers: bool) -> None:
        """A step begins: after its requests were announced, before it runs."""
        self.steps += 1
        self.announced = True
        self.only_answers = only_answers
        if self._unwritten and self.table is not None:
            self.table.write(self._unwritten)
            self._unwritten = {}

    def end_step(self) -> None:
        """The step is over; what runs before the next one is a rehearsal."""
        self.announced = self.only_answers = False
        self.steps += 1

    def take_decided(self) -> list[Request]:
        """The requests whose routes were decided since the last call."""
        decided, self._decided = self._decided, []
        return decided
