"""Scores of a patched model, dense, all full, all sparse and routed (:func:`evaluate`).

Tasks to score it on are in ``ruler`` (and ``tasks``, for the demonstration), files of LongBench's form are read by
``longbench``, and ``report`` writes what it gave.
"""

from .results import MODES, Mode, Result, modes_of
from .runner import Score, evaluate, format_table

__all__ = ["MODES", "Mode", "Result", "Score", "evaluate", "format_table", "modes_of"]
