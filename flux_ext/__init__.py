"""Attention that is full or sparse per sequence, layer and head, chosen from the input.

    out = flux_ext.attention(q, k, v, route)
    flux_ext.patch(model, routers="folder-or-hub-id")

Flux Attention (arXiv 2604.07394) and Elastic Attention (arXiv 2601.17367) as one package.
"""

from .ops import attention
from .patterns import BlockSparse, Full, Streaming, Triangle

__version__ = "0.1.0"

__all__ = ["BlockSparse", "Full", "Streaming", "Triangle", "attention"]
