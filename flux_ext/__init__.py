"""Attention that is full or sparse per sequence, layer and head, chosen from the input.

    out = flux_ext.attention(q, k, v, route)
    flux_ext.patch(model, routers="folder-or-hub-id")

Flux Attention (arXiv 2604.07394) and Elastic Attention (arXiv 2601.17367) as one package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .config import FluxConfig
from .operators import Explanation, attention, explain
from .operators.pattern_functions import register_pattern
from .operators.patterns import BlockSparse, Full, Streaming, Triangle

if TYPE_CHECKING:
    from .caches.dynamic import FluxCache
    from .caches.static import FluxStaticCache
    from .evaluation import evaluate
    from .models.patching import get_routers, is_patched, patch, patched, routes, unpatch
    from .routers.collection import FluxRouters

__version__ = "0.1.0"

# Names that need transformers are imported when first used.
_LAZY = {
    "FluxCache": "caches.dynamic",
    "FluxRouters": "routers.collection",
    "FluxStaticCache": "caches.static",
    "evaluate": "evaluation",
    "get_routers": "models.patching",
    "is_patched": "models.patching",
    "patch": "models.patching",
    "patched": "models.patching",
    "routes": "models.patching",
    "unpatch": "models.patching",
}

__all__ = [
    "BlockSparse",
    "Explanation",
    "FluxCache",
    "FluxConfig",
    "FluxRouters",
    "FluxStaticCache",
    "Full",
    "Streaming",
    "Triangle",
    "attention",
    "evaluate",
    "explain",
    "get_routers",
    "is_patched",
    "patch",
    "patched",
    "register_pattern",
    "routes",
    "unpatch",
]


if not TYPE_CHECKING:  # a type checker reads the imports above, and would take any name for one of these

    def __getattr__(name):
        if name in _LAZY:
            return getattr(import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return list(__all__)
