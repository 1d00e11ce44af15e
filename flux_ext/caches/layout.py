"""Which tokens a sequence head drops and in which of its pages the others lie: the arithmetic of both caches.

A sequence head is one KV head of one sequence: what has a route, a length and pages of its own. Its tokens lie in pages
of equal size. One that is routed sparse drops what no later query sees, so that what it stores is

    the sink, in whole pages | (the gap: tokens that were dropped) | the window, and a few tokens before it

``csrc/core/append.h`` has the same arithmetic for the step on the device.
"""

from __future__ import annotations

import math

import numpy as np

from ..operators.patterns import Positions, Streaming


class PageLayout:
    """The layout under one pattern and page size.

    Attributes:
        pattern: what sparse sequence heads see.
        page_size: tokens per page.
        sink_pages, sink_tokens: what precedes the gap: the sink, rounded up to whole pages.
        unit: tokens are dropped by this many: whole pages, so that the others stay where they are, and a multiple of
            ``pattern.align``, so that the pattern is the same on what is left (see :mod:`flux_ext.caches.layer`).
        least_trimmed: with fewer tokens stored there is no such unit to drop.
    """

    def __init__(self, pattern: Streaming, page_size: int) -> None:
        self.pattern, self.page_size = pattern, page_size
        self.sink_pages = -(-pattern.sink // page_size)
        self.sink_tokens = self.sink_pages * page_size
        self.unit = math.lcm(pattern.align, page_size)
        self.least_trimmed = self.sink_tokens + pattern.window - pattern.align + self.unit

    def gap(self, position: Positions) -> Positions:
        """Tokens after ``sink_tokens`` that no query at this position or later sees, rounded down to whole units."""
        unseen = self.pattern.window_begin(position) - self.sink_tokens
        return unseen * (unseen > 0) // self.unit * self.unit

    def ring_pages(self) -> int:
        """Pages for what follows the gap, where they are overwritten in turn."""
        # The window, what alignment and whole units add to it, the token to come; one page for partial ones.
        tokens = self.pattern.window + self.pattern.align + self.unit + 1
        return -(-tokens // self.page_size) + 1

    def place(self, page: np.ndarray, ring: np.ndarray) -> np.ndarray:
        """Where the pages of a sequence lie among those that a sequence head has: those of the sink stay, the others go
        round ``ring`` pages after them.

        Args:
            page: integers, token // page_size.
            ring: integers, at least 1; broadcasts against ``page``.
        """
        return np.where(page < self.sink_pages, page, self.sink_pages + (page - self.sink_pages) % ring)
