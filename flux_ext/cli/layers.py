"""Routes as a line of letters, one per routed layer."""

from torch import Tensor

LEGEND = "F full, s sparse, m mixed heads"


def letters(route: Tensor) -> str:
    """One sequence's routes ``[L, Hkv]`` in the letters of :data:`LEGEND`."""
    return "".join("F" if share == 0 else "s" if share == 1 else "m" for share in route.float().mean(1).tolist())
