"""Quality against sparsity, for several ways to route: the table of ``flux-ext frontier``, and its picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from .. import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """What one way to route gave on one task: a row of the table."""

    task: str
    routes: str
    """``"dense"``, ``"full"`` (every route is; where the full mode is another than full attention), ``"sparse"``,
    ``"static"`` (the same layers or heads for all inputs), ``"routed"``, or ``"soft"``,
    ``"straight_through"`` or ``"even_odds"``: routers that learnt with this objective."""
    granularity: str
    """``"layer"`` or ``"head"``; empty where everything is routed alike."""
    pattern: str
    """What sparse attention sees, and with routes ``"full"`` the full mode; empty where everything is seen."""
    budget: str
    """That the routers keep to, as it was given; behind it that of their training, where it is another. Empty without
    one."""
    seed: int
    """Of training, or of the search for static routes."""
    examples: int
    measure: str
    """``"accuracy"`` (more is better) or ``"bits_per_byte"`` (less is)."""
    score: float
    dense_score: float
    """Of the dense model, with full attention whatever the full mode is, on the same examples; NaN where it was not
    run."""
    sparsity: float
    """Mean share of sparse attention over layers and heads."""

    @property
    def kept(self) -> float:
        """The share of the dense score that is left, of bits the inverse: 1 is as good as dense, more is better."""
        better, worse = (self.score, self.dense_score) if self.measure == "accuracy" else (self.dense_score, self.score)
        return better / worse if worse else math.nan

    @property
    def way(self) -> tuple[str, str, str]:
        """What the points of several seeds have in common: routes, granularity and budget; of static ones, whose
        budgets are sparsities, the latter."""
        return self.routes, self.granularity, self.budget if self.routes != "static" else f"{self.sparsity:.2f}"


COLUMNS = tuple(f.name for f in fields(Point))


def write_table(points: Iterable[Point], path: Path, header: Sequence[str] = ()) -> None:
    """Writes the points as CSV; lines of the ``header`` stand before it, each behind a ``#``."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for point in points:
            values = ("" if isinstance(x, float) and math.isnan(x) else x for x in astuple(point))
            table.writerow(round(x, 6) if isinstance(x, float) else x for x in values)


def read_table(path: Path) -> list[Point]:
    """What :func:`write_table` has written.

    Raises:
        ValueError: a line has other columns, or something that is no number; the message names file and line.
    """
    with open(path, encoding="utf-8", newline="") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if not line.startswith("#")]
    points = []
    for (number, _), row in zip(lines, csv.reader(line for _, line in lines), strict=True):
        if tuple(row) == COLUMNS:
            continue
        try:
            given = dict(zip(COLUMNS, row, strict=True))
            points.append(
                Point(
                    given["task"],
                    given["routes"],
                    given["granularity"],
                    given["pattern"],
                    given["budget"],
                    int(given["seed"]),
                    int(given["examples"]),
                    given["measure"],
                    *(float(given[name] or "nan") for name in ("score", "dense_score", "sparsity")),
                )
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a row of {', '.join(COLUMNS)} ({error})") from None
    return points


@dataclass(frozen=True)
class Spread:
    """Mean and deviation over the seeds, of one way to route on one task."""

    seeds: int
    sparsity: float
    score: float
    score_deviation: float
    """0 where there is one seed."""
    kept: float
    kept_deviation: float


def spreads(points: Sequence[Point]) -> dict[tuple[str, str, str], dict[str, Spread]]:
    """By way and task."""
    groups: dict[tuple[str, str, str], dict[str, list[Point]]] = {}
    for point in points:
        groups.setdefault(point.way, {}).setdefault(point.task, []).append(point)
    return {way: {task: _spread(group) for task, group in by_task.items()} for way, by_task in sorted(groups.items())}


def _spread(group: Sequence[Point]) -> Spread:
    def deviation(values: Sequence[float]) -> float:
        return stdev(values) if len(values) > 1 else 0.0

    scores, kept = [p.score for p in group], [p.kept for p in group]
    return Spread(
        len(group), fmean(p.sparsity for p in group), fmean(scores), deviation(scores), fmean(kept), deviation(kept)
    )


LINES = {
    ("routed", "head"): "routers, per head",
    ("routed", "layer"): "routers, per layer",
    ("soft", "head"): "routers, per head, soft",
    ("soft", "layer"): "routers, per layer, soft",
    ("straight_through", "head"): "routers, per head, straight-through",
    ("straight_through", "layer"): "routers, per layer, straight-through",
    ("static", "head"): "static heads",
    ("static", "layer"): "static layers",
    ("sparse", ""): "all sparse",
    ("full", ""): "all by the full mode",
    ("even_odds", "head"): "routers, per head, at even odds",
    ("even_odds", "layer"): "routers, per layer, at even odds",
}
"""What is drawn, by routes and granularity, and what it is called."""
LEAST = 0.05
"""A task at which the dense model is no better than this says nothing of what is kept: it is left out of the mean."""


def picture(points: Sequence[Point]) -> Figure:
    """What is kept of dense quality against sparsity in the mean over the tasks, and the score of each task, upwards
    always better; a line per way to route, a mark per budget or sparsity with its deviation over the seeds."""
    found = spreads(points)
    tasks = list(dict.fromkeys(p.task for p in points))
    dense = {p.task: p for p in points if p.routes == "dense"}
    none_sparse = dense | {p.task: p for p in points if p.routes == "full"}
    telling = [t for t in tasks if t in dense and (dense[t].measure != "accuracy" or dense[t].score >= LEAST)]
    overview: dict[str, list[pictures.Mark]] = {}
    panels: dict[str, dict[str, list[pictures.Mark]]] = {task: {} for task in tasks}
    for way, by_task in found.items():
        if (label := LINES.get(way[:2])) is None:
            continue
        if telling and set(telling) <= set(by_task):
            chosen = [by_task[t] for t in telling]
            sparsity, kept = fmean(s.sparsity for s in chosen), fmean(s.kept for s in chosen)
            overview.setdefault(label, []).append(pictures.Mark(sparsity, kept, _pooled(points, way, telling)))
        for task, spread in by_task.items():
            mark = pictures.Mark(spread.sparsity, spread.score, spread.score_deviation)
            panels[task].setdefault(label, []).append(mark)
    for lines in (overview, *panels.values()):  # none sparse, and all, are static allocations too
        ends = [m for m in lines.get(LINES["sparse", ""], ()) if m.sparsity == 1]
        for label in (LINES["static", "head"], LINES["static", "layer"]):
            if label in lines:
                lines[label] += ends
    for label in (LINES["static", "head"], LINES["static", "layer"]):
        if label in overview:
            overview[label].append(pictures.Mark(0, fmean(none_sparse[t].kept for t in telling)))
        for task, lines in panels.items():
            if label in lines and task in none_sparse:
                lines[label].append(pictures.Mark(0, none_sparse[task].score))
    return pictures.quality(
        overview,
        {
            task: pictures.Panel(
                lines,
                dense[task].score if task in dense else None,
                next(p.measure for p in points if p.task == task) == "accuracy",
                task in telling or task not in dense,
            )
            for task, lines in panels.items()
        },
        list(LINES.values()),
    )


def _pooled(points: Sequence[Point], way: tuple[str, str, str], tasks: Sequence[str]) -> float:
    """Deviation over the seeds of the mean over the tasks of what is kept."""
    by_seed: dict[int, list[float]] = {}
    for point in points:
        if point.way == way and point.task in tasks:
            by_seed.setdefault(point.seed, []).append(point.kept)
    means = [fmean(kept) for kept in by_seed.values() if len(kept) == len(tasks)]
    return stdev(means) if len(means) > 1 else 0.0
