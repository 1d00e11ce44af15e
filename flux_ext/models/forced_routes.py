"""Routes that callers force on a model, in one thread or in all of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from ..forward_context import Policy


class ForcedRoutes:
    """The blocks of :func:`flux_ext.routes` that are open on one model, whatever thread opened them; copies of the
    model start without any."""

    def __init__(self) -> None:
        self._everywhere: list[Policy] = []
        self._in_one_thread: list[Policy] = []
        self._warned = False

    def __deepcopy__(self, memo: object) -> ForcedRoutes:
        return ForcedRoutes()

    def __reduce__(self) -> tuple[type[ForcedRoutes], tuple[()]]:
        return ForcedRoutes, ()

    @contextlib.contextmanager
    def opened(self, policy: Policy, everywhere: bool) -> Iterator[None]:
        """Counts a block that chooses by ``policy`` as open within a ``with`` block."""
        blocks = self._everywhere if everywhere else self._in_one_thread
        blocks.append(policy)
        try:
            yield
        finally:
            blocks.remove(policy)

    def everywhere(self) -> Policy | None:
        """The policy for threads that have no block of their own: that of the newest block for all threads."""
        newest = self._everywhere[-1:]  # in one step: another thread may close the block meanwhile
        return newest[0] if newest else None

    def warn_of_others(self) -> None:
        """To be called where routers decide because nothing is forced in this thread: says so once, if something is
        forced in another one, for that is most often the thread that started this one."""
        if self._in_one_thread and not self._warned:
            self._warned = True
            warnings.warn(
                "the routers decide this forward: flux_ext.routes is in force on the model, but in another thread. "
                "Enter the block in the thread that generates, or force the routes in all threads with "
                "flux_ext.routes(model, ..., everywhere=True). (Said once for each model.)",
                stacklevel=2,
            )
