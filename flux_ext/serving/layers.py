"""One layer of a served model: its router, and its attention over pages. Nothing here knows vLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import operators
from ..config import FluxConfig
from ..operators.patterns import Full
from ..routers.modules import Router
from .requests import Request, Requests
from .steps import AnswerStep, PromptStep, Row, Step


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
    """

    def __init__(self, index: int, router: Router, config: FluxConfig, requests: Requests) -> None:
        self.index, self.router, self.requests = index, router, requests
        self.pattern = config.streaming()

    def see(self, states: Tensor, step: Step) -> None:
        """Decides the routes of the requests whose prompts this step completes, and remembers of the others what
        their router will pool.

        Args:
            states: ``[T, H, D]``, the new tokens' queries (per-head routers: keys) before the rotary embedding.
        """
        if isinstance(step, AnswerStep):
            return  # whose requests have their routes
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

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, step: Step, scale: float
    ) -> Tensor:
        """Attention of a step's tokens, whose own keys and values are in the pages already.

        Args:
            q: ``[T, Hq, D]``, packed.
            k_pages, v_pages: ``[num_pages, page_size, Hkv, D]``, any strides with the last dimension contiguous.
            page_table: int32 ``[B, max_pages]``, of this layer, a row per request of the step.

        Returns:
            ``[T, Hq, D]``.
        """
        if isinstance(step, AnswerStep):
            return self._attend_answers(q, k_pages, v_pages, page_table, step, scale)
        return self._attend_prompts(q, k_pages, v_pages, page_table, step, scale)

    def _attend_prompts(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, step: PromptStep, scale: float
    ) -> Tensor:
        plan = step.plan(self.index, k_pages.shape[1], page_table)
        if plan is None:
            return torch.zeros_like(q)
        kv = operators.KeyValues(k_pages, v_pages, end=plan.kv_len, page_table=plan.visible(page_table))
        return operators.attend(q, kv, self._routing(plan.route), scale, plan.cu_seqlens)[0]

    def _attend_answers(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, step: AnswerStep, scale: float
    ) -> Tensor:
        first_pages = page_table[:, :1]
        route = self.requests.routes_at(first_pages[:, 0])
        hidden = step.hidden(k_pages.shape[1], page_table.shape[1]) & route.all(1, keepdim=True)
        visible = torch.where(hidden, first_pages, page_table)  # as in a Plan
        kv = operators.KeyValues(k_pages, v_pages, end=step.kv_len, page_table=visible)
        route = route if route.shape[1] > 1 else route[:, 0]
        return operators.attend(q[:, None], kv, self._routing(route), scale)[0][:, 0]

    def _routing(self, route: Tensor) -> operators.Routing:
        return operators.Routing(route, Full(), self.pattern)
