"""What a cache holds, in words a user reads: routes as letters, and memory beside that of a dense cache."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .dynamic import FluxCache

LEGEND = "F full, s sparse, m mixed heads"


def letters(route: Tensor) -> str:
    """One sequence's routes ``[L, Hkv]`` in the letters of :data:`LEGEND`, one per routed layer."""
    return "".join("F" if share == 0 else "s" if share == 1 else "m" for share in route.float().mean(1).tolist())


def summary(cache: FluxCache) -> str:
    """The text of :meth:`FluxCache.summary`."""
    if not _began(cache):
        return "empty: nothing is routed or stored before the first forward"
    kept, dense = cache.nbytes(), cache.dense_nbytes()
    alike = Counter(letters(route) for route in cache.routes.cpu())
    routed = [f"  {layers}  {_count(count, 'sequence')}" for layers, count in alike.most_common()]
    return "\n".join(
        [
            f"{_count(cache.batch_size, 'sequence')}, {_count(int(cache.get_seq_length()), 'token')}; "
            f"routed layers, first to last ({LEGEND}):",
            *routed,
            f"{megabytes(kept)} of keys and values kept; a dense cache would have {megabytes(dense)}"
            + (f" ({kept / dense:.0%})" if dense else ""),
        ]
    )


def held(cache: FluxCache) -> str:
    """Sequences and bytes in a few words, without a wait for the device."""
    return f"{_count(cache.batch_size, 'sequence')}, {megabytes(cache.nbytes())}" if _began(cache) else "empty"


def _began(cache: FluxCache) -> bool:
    """Whether a forward has stored its tokens and their routes."""
    return any(getattr(layer, "is_initialized", False) for layer in cache.layers)


def megabytes(count: int) -> str:
    """Bytes in MB (10^6), with enough digits to tell small caches apart."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 1 if count >= 1e6 else 4}f} MB"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
