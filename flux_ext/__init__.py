"""Attention that is full or sparse per sequence, layer and head, chosen from the input.

    out = flux_ext.attention(q, k, v, route)
    flux_ext.patch(model, routers="folder-or-hub-id")

Flux Attention (arXiv 2604.07394) and Elastic Attention (arXiv 2601.17367) as one package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import FluxConfig
from .ops import attention
from .patterns import BlockSparse, Full, Streaming, Triangle

if TYPE_CHECKING:
    from .cache import FluxCache
    from .patching import get_routers, is_patched, patch, patched, routes, unpatch
    from .routers import FluxRouters
    from .static_cache import FluxStaticCache

__version__ = "0.1.0"

# Names that need transformers are imported when first used.
_LAZY = {
    "FluxCache": "cache",
    "FluxRouters": "routers",
    "FluxStaticCache": "static_cache",
    "get_routers": "patching",
    "is_patched": "patching",
    "patch": "patching",
    "patched": "patching",
    "routes": "patching",
    "unpatch": "patching",
}

__all__ = [
    "BlockSparse",
    "FluxCache",
    "FluxConfig",
    "FluxRouters",
    "FluxStaticCache",
    "Full",
    "Streaming",
    "Triangle",
    "attention",
    "get_routers",
    "is_patched",
    "patch",
    "patched",
    "routes",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
