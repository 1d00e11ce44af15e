"""Pictures of what is easier to look at than to read. Need matplotlib; each returns the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .operators.patterns import Full, Pattern, Streaming

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def routes(share_full: Mapping[str, Sequence[float] | Tensor]) -> Figure:
    """How often each layer is routed to full attention, one row per task.

    Args:
        share_full: per task, the share of full attention of each layer, in [0, 1].
    """
    from matplotlib.figure import Figure

    table = np.array([[float(x) for x in row] for row in share_full.values()])
    figure = Figure(figsize=(1.6 + 0.5 * table.shape[1], 1.4 + 0.5 * table.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "black"
        )
    axes.set_yticks(range(len(share_full)), list(share_full))
    axes.set_xticks(range(table.shape[1]))
    axes.set_xlabel("layer")
    axes.set_title("share of full attention")
    figure.colorbar(image, ax=axes)
    return figure


def frontier(sides: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]]) -> Figure:
    """Scores against sparsity.

    Args:
        sides: per measure, which names its axis, and per task: points (sparsity, score, how it was routed).
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = list(dict.fromkeys(task for lines in sides.values() for task in lines))
    modes = list(dict.fromkeys(mode for lines in sides.values() for points in lines.values() for *_, mode in points))
    color = {task: colormaps["tab20"](i % 20) for i, task in enumerate(tasks)}
    mark = {mode: "osD^v*"[i % 6] for i, mode in enumerate(modes)}
    figure = Figure(figsize=(2.2 + 4.2 * len(sides), 4.2), layout="constrained")
    for axes, (measure, lines) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True):
        for task, points in lines.items():
            ordered = sorted(points)
            axes.plot([x for x, *_ in ordered], [y for _, y, _ in ordered], color=color[task], linewidth=0.8)
            for x, y, mode in points:
                axes.plot(x, y, mark[mode], color=color[task])
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("sparsity")
        axes.set_ylabel(measure)
    handles = [Line2D([], [], color=color[task], label=task) for task in tasks]
    handles += [Line2D([], [], color="black", marker=mark[m], linestyle="", label=m) for m in modes]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def schedule(
    q_len: Sequence[int],
    kv_len: Sequence[int],
    route: Sequence[Sequence[int]],
    *,
    group: int = 4,
    full: Pattern = Full(),
    sparse: Pattern = Streaming(),
    q_tokens: int = 32,
    kv_block: int = 128,
    num_workers: int = 16,
) -> Figure:
    """Which worker does which key blocks of which tile: one bar per worker, one colour per (sequence, KV head).

    Args:
        q_len, kv_len: lengths of the sequences.
        route: per sequence and KV head, 0 full or 1 sparse.
        group: query heads per KV head.
        full, sparse: the two patterns (not block lists).
        q_tokens, kv_block: queries and keys of a tile.
        num_workers: thread blocks, or threads of a CPU, that share the work.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from ._C import plan

    pieces = plan(
        np.asarray(q_len, np.int32),
        np.asarray(kv_len, np.int32),
        np.asarray(route, np.int32),
        group,
        full.numbers(),
        sparse.numbers(),
        q_tokens,
        kv_block,
        num_workers,
    )
    figure = Figure(figsize=(9, 1.2 + 0.22 * num_workers), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"]
    filled = np.zeros(num_workers)
    named = set()
    for worker, sequence, head, _row, begin, end, blocks in pieces:
        cut = begin > 0 or end < blocks
        row = (int(sequence), int(head))
        label = f"sequence {sequence}, head {head} ({'sparse' if route[sequence][head] else 'full'})"
        axes.barh(
            worker,
            end - begin,
            left=filled[worker],
            height=0.85,
            color=colors((sequence * len(route[0]) + head) % 20),
            edgecolor="black" if cut else "white",
            hatch="//" if cut else None,
            linewidth=0.4,
            label=None if row in named else label,
        )
        named.add(row)
        filled[worker] += end - begin
    axes.set_xlabel("key blocks (hatched: part of a cut tile)")
    axes.set_ylabel("worker")
    axes.invert_yaxis()
    if len(named) <= 20:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
