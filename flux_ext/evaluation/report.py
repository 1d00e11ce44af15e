"""Scores as files: JSON, a table (CSV) and pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .. import pictures, strict_json
from .results import MODES, Mode
from .runner import Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = tuple(f.name for f in fields(Score) if f.name != "full_share")


def files_of(output: Path) -> dict[str, Path]:
    """What :func:`write_report` writes beside ``scores.json``, and where single results are kept, by kind."""
    return {
        "json": output,
        "csv": output.with_suffix(".csv"),
        "picture": output.with_suffix(".png"),
        "routes": output.with_name(f"{output.stem}-routes.png"),
        "results": output.with_name(f"{output.stem}-results.jsonl"),
    }


def write_report(scores: Sequence[Score], output: Path) -> None:
    """Writes the scores as JSON and, beside it, as CSV and as two pictures: the scores against sparsity, and how often
    each layer was full in each task (where routers decided).

    Args:
        scores: from :func:`~flux_ext.evaluation.evaluate`.
        output: the JSON file, ``scores.json`` say; the others are ``scores.csv``, ``scores.png`` and
            ``scores-routes.png``.
    """
    files = files_of(output)
    files["json"].write_text(strict_json.dumps([asdict(s) for s in scores]), encoding="utf-8")
    with open(files["csv"], "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for score in scores:
            values = (getattr(score, c) for c in _COLUMNS)
            table.writerow("" if isinstance(x, float) and not math.isfinite(x) else x for x in values)
    frontier(scores).savefig(files["picture"], dpi=150)
    if routed := {s.task: s.full_share for s in scores if s.mode == "routed"}:
        pictures.routes(routed).savefig(files["routes"], dpi=150)


def dense_remark(scores: Sequence[Score], full: Mode = "dense") -> str | None:
    """Why a task's routed scores are its dense ones, where they are because all its routes were full; else None.

    Args:
        scores: from :func:`~flux_ext.evaluation.evaluate`.
        full: the mode that all routes full are: ``"full"`` where the full mode is another than full attention.
    """
    tasks = [s.task for s in scores if s.mode == "routed" and s.sparsity == 0]
    if not tasks:
        return None
    return (
        f"routed equals {full} on {', '.join(tasks)}: the routers chose "
        f"{'full attention' if full == 'dense' else 'the full mode'} in every layer and example, "
        "as new ones do. Training may have shown some sparsity all the same, because its sampling explores; in use "
        "argmax decides. Train for more steps, or with a larger budget or target"
    )


def frontier(scores: Sequence[Score]) -> Figure:
    """Scores against sparsity: on the left the accuracy of generated answers, on the right bits per byte, a line per
    task and a mark per mode; what was not measured has no side."""
    sides: dict[str, tuple[str, list[Score]]] = {
        "accuracy": ("accuracy (more is better)", [s for s in scores if not math.isnan(s.accuracy)]),
        "bits_per_byte": ("bits per byte (less is better)", [s for s in scores if not math.isnan(s.bits_per_byte)]),
    }
    lines = {
        label: {
            task: [
                (s.sparsity, getattr(s, name), s.mode)
                for s in sorted(chosen, key=lambda s: MODES.index(s.mode))
                if s.task == task
            ]
            for task in sorted({s.task for s in chosen})
        }
        for name, (label, chosen) in sides.items()
        if chosen
    }
    return pictures.frontier(lines)
