"""Scores of a patched model, dense, all sparse and routed (:func:`evaluate`); two tasks to try it on (``tasks``)."""

from .runner import MODES, Mode, Score, evaluate, format_table

__all__ = ["MODES", "Mode", "Score", "evaluate", "format_table"]
