"""Pictures of what is easier to look at than to read. Need matplotlib; each returns the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from .operators.patterns import Full, Pattern, Streaming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
        sides: per measure, which names its axis, and per task: points (sparsity, score, how it was routed). Lines go
            from the least sparsity to the greatest, through equal ones in the given order.
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
            ordered = sorted(points, key=lambda point: point[0])
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


class Mark(NamedTuple):
    """A point of :func:`quality`: where it stands, and how far its height is off in the mean."""

    sparsity: float
    height: float
    deviation: float = 0.0


class Panel(NamedTuple):
    """One of the small panels of :func:`quality`."""

    lines: Mapping[str, Sequence[Mark]]
    dense: float | None
    """The dense model's height."""
    more_is_better: bool
    telling: bool
    """Whether the dense model is good enough at it for the others to say something."""


def quality(overview: Mapping[str, Sequence[Mark]], panels: Mapping[str, Panel], names: Sequence[str]) -> Figure:
    """What ways to route keep: one large panel, and a small one per task. Up is better everywhere.

    Args:
        overview: the share of the dense model's quality that is kept, by line.
        panels: by task.
        names: of all lines, in the order of their colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shades = ("#d1495b", "#1f6fb4", "#8c2d75", "#4b3f9e", "#c77c5e", "#5fa8a3", "#e8a33d", "#7a9e3f", "black",
              "#3a9fbf", "#2b8a3e", "#9c6b1f")  # fmt: skip
    colors = {name: shades[i % len(shades)] for i, name in enumerate(names)}
    columns = -(-len(panels) // 2)
    figure = Figure(figsize=(4.6 + 2.1 * columns, 4.9), layout="constrained")
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[2.1, *[1] * columns])

    def draw(axes: Axes, lines: Mapping[str, Sequence[Mark]], dense: float | None, size: float) -> None:
        if dense is not None:
            axes.axhline(dense, color="#888888", linewidth=1, linestyle="--")
        for name in names:
            marks = sorted(lines.get(name, ()))
            if not marks:
                continue
            ours, alone = name.startswith("routers"), len(marks) == 1
            axes.errorbar(
                [m.sparsity for m in marks],
                [m.height for m in marks],
                [m.deviation for m in marks],
                color=colors[name],
                marker="o" if ours else "x" if alone else "s",
                markersize=size * (1 if ours or alone else 0.75),
                linewidth=1.6 if ours else 1,
                linestyle="-" if ours else ":",
                capsize=2,
                zorder=3 if ours else 4 if alone else 2,  # where lines end, a cross is still to be seen
            )
        axes.set_xlim(-0.02, 1.04)
        axes.spines[["top", "right"]].set_visible(False)

    large = figure.add_subplot(grid[:, 0])
    draw(large, overview, 1.0, 7)
    large.set_title("quality kept, mean over the tasks", fontsize=10, loc="left")
    large.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    large.set_xlabel("sparsity: share of attention that is sparse")
    for place, (task, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place // columns, 1 + place % columns])
        draw(axes, panel.lines, panel.dense, 4)
        unit = ", score" if panel.more_is_better else ", bits per byte"
        color = "black" if panel.telling else "#999999"
        axes.set_title(
            f"{task}{unit}{'' if panel.telling else chr(10) + '(dense fails too)'}", fontsize=8, loc="left", color=color
        )
        axes.tick_params(labelsize=7)
        if not panel.more_is_better:
            axes.invert_yaxis()
    handles = [
        Line2D([], [], color=colors[n], marker="o" if n.startswith("routers") else "s", label=n,
               linestyle="-" if n.startswith("routers") else ":")
        for n in names
        if n in overview or any(n in panel.lines for panel in panels.values())
    ]  # fmt: skip
    handles.append(Line2D([], [], color="#888888", linestyle="--", label="dense"))
    across = max(int(figure.get_figwidth() / 2.8), 1)  # room for the longest name
    figure.legend(handles=handles, loc="outside upper left", ncols=across, fontsize=9, frameon=False)
    return figure


_START = "#555555"
"""The colour of a tile's own cost."""


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

    A tile costs one block more than it has, drawn grey where the tile begins: the bars that are to be equally long
    include it.

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
    from matplotlib.patches import Patch

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
    figure = Figure(figsize=(10, 1.4 + 0.22 * num_workers), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"]
    heads = len(route[0])
    filled = np.zeros(num_workers)
    for worker, sequence, head, _row, begin, end, blocks in pieces:
        if begin == 0:
            axes.barh(worker, 1, left=filled[worker], height=0.85, color=_START)
            filled[worker] += 1
        cut = begin > 0 or end < blocks
        color = colors((sequence * heads + head) % 20)
        axes.barh(worker, end - begin, left=filled[worker], height=0.85, color=color, edgecolor="white",
                  hatch="///" if cut else None, linewidth=0.4)  # fmt: skip
        filled[worker] += end - begin
    axes.set_title(
        "All workers have the same amount of work, whatever is full or sparse: what each does, from left to right",
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel(f"work, in blocks of {kv_block} keys for a tile of {q_tokens} queries x {group} query heads")
    axes.set_ylabel("worker (CPU thread or CUDA thread block)")
    axes.set_yticks(range(num_workers))
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(color=colors((b * heads + h) % 20), label=f"sequence {b} ({q_len[b]} tokens), KV head {h}: {mode}")
        for b, own in enumerate(route)
        for h, mode in enumerate("sparse" if r else "full" for r in own)
    ]
    if len(handles) > 20:
        handles = []  # colours repeat
    handles.append(
        Patch(facecolor="#dddddd", edgecolor="white", hatch="///", label="part of a tile that workers share")
    )
    handles.append(Patch(color=_START, label="a tile begins and ends: counted as one block"))
    figure.legend(handles=handles, fontsize=8, loc="outside right upper", frameon=False)
    return figure
