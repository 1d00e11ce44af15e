"""The command ``flux-ext`` and its demonstration."""

from .commands import main

__all__ = ["main"]
