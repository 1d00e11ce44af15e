"""What a worker knows of the requests it serves: where their prompts end, and their routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
        routes: per layer, 0 full or 1 sparse, one number or one per KV head.
        rows: per layer, states of the prompt's tokens so far that its router will pool, ``[n, H, D]``.
    """

    name: str
    prompt_len: int
    first_pages: tuple[int, ...]
    dense_until: int | None = None
    routes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def is_sparse(self, layer: int) -> bool:
        """Whether all of a layer is routed sparse, so that the pages that are out of sight are needed no more."""
        return all(self.routes.get(layer, (0,)))


class Requests:
    """The requests of one worker, found by name or by their first page."""

    def __init__(self) -> None:
        self._by_name: dict[str, Request] = {}
        self._by_page: dict[tuple[int, int], Request] = {}
        self._decided: list[Request] = []

    def __len__(self) -> int:
        return len(self._by_name)

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

    def decide(self, request: Request, layer: int, route: tuple[int, ...], dense_until: int) -> None:
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

    def take_decided(self) -> list[Request]:
        """The requests whose routes were decided since the last call."""
        decided, self._decided = self._decided, []
        return decided
