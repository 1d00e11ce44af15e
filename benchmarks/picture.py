"""Pictures of measured tables: how long things take, how many times as fast they are, how near to the machine's limit.

    python -m benchmarks picture benchmarks/results/*.csv --output docs/images

One picture per table of ``benchmarks cuda`` (two: prefill, decode), ``end_to_end``, ``cpu`` and ``frontier``, named
after it; none of other tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.cuda.criteria import read_models as read_table
from benchmarks.cuda.problems import OURS
from benchmarks.cuda.table import Row, read
from flux_ext.evaluation import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """How one line, or bar, is drawn."""

    name: str
    color: str
    style: str = "-"


FULL, QUARTER, HALF, BLOCKS, ALL = "#1f6fb4", "#38a3c9", "#2a9d76", "#8d6cb8", "#e0702d"
"""Of ours: what is sparse. Others are grey."""
DENSE = (
    ("SDPA flash", Line("dense, FlashAttention-2", "#b8b8b8", "--")),
    ("SDPA cuDNN", Line("dense, cuDNN", "#8a8a8a", "--")),
    ("FlashAttention-3", Line("dense, FlashAttention-3", "#3c3c3c", "--")),
)
SHARES = {"0": "none", "0.5": "1/2", "0.75": "3/4", "0.9": "9/10"}
"""As the tables write a share of sparse layers, and as people do."""


ALL_FULL = "flux_ext, all heads full"
PADDED = (
    "Padded batches gain without any sparsity: SDPA computes the padding too, by a dense mask; flux_ext the tokens "
    "alone (1/4, 2/4, 3/4 and 4/4 of the length: 47 % of the pairs)"
)
"""Lengths as ``benchmarks end_to_end`` makes them."""


def tokens(n: int) -> str:
    """131072 as 128K."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def short(x: float) -> str:
    """A number with two or three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2g}" if x < 1 else f"{x:.2f}"


def figure_of(panels: int, title: str, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side under one title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 0.5 + 3.7 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    axes = figure.subplots(rows, panels, squeeze=False).flatten()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def draw_lines(
    axes: Axes, title: str, unit: str, lines: dict[Line, dict[int, float]], log: bool = True, above: float = 0
) -> None:
    """Values over lengths; the axis of lengths is logarithmic, that of values where asked."""
    lengths = sorted({n for points in lines.values() for n in points})
    for (name, color, style), points in lines.items():
        order = sorted(points)
        axes.plot(order, [points[n] for n in order], style, color=color, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(n) for n in lengths])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.grid(alpha=0.25)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    else:
        axes.set_ylim(0, max(above, *(y for points in lines.values() for y in points.values())) * 1.12)


def draw_bars(axes: Axes, title: str, unit: str, bars: dict[Line, float], beside: str | None = None) -> None:
    """Times, one bar each; behind each how many times as fast it is as the bar of that name."""
    base = next((x for line, x in bars.items() if line.name == beside), None)
    for y, (line, x) in enumerate(bars.items()):
        axes.barh(y, x, 0.7, color=line.color)
        times = f"  ({base / x:.{1 if base / x < 20 else 0}f}x)" if base and line.name != beside else ""
        axes.text(x, y, f" {short(x)}{times}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [line.name for line in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, max(bars.values()) * 1.3)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")


def draw_legend(figure: Figure, axes: Axes) -> None:
    """One for all panels, below them, of the lines of one."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)


class Stage(NamedTuple):
    """One picture of ``benchmarks cuda``: groups of the table (the first one's ``kind`` is dense), and units."""

    dense: str
    kind: str
    streaming: str
    mixed: str
    what: str
    over_length: str
    unit: str
    microseconds: float
    rate: str
    ceiling: str


STAGES = {
    "prefill": Stage(
        "dense", "dense", "streaming", "mixed-heads", "over one prompt",
        "time: dense grows with the square, streaming with the length", "ms", 1e3, "TFLOP/s", "bf16 matrix product",
    ),
    "decode": Stage(
        "decode", "full", "decode-streaming", "decode-mixed", "in one decode step",
        "time: dense grows with the length, streaming does not", "microseconds", 1.0, "TB/s", "device copy",
    ),
}  # fmt: skip
Found = dict[Line, dict[int, Row]]


def _found(rows: Sequence[Row], stage: Stage) -> Found:
    """Rows of one sequence, 32 query and 8 KV heads of 128, by what attends and by length."""

    def of(group: str, kind: str, contender: str = OURS) -> dict[int, Row]:
        same = (r for r in rows if (r.group, r.kind, r.contender, r.batch) == (group, kind, contender, 1))
        return {r.length: r for r in same if r.us and r.rate and (r.dim, r.heads, r.kv_heads) == (128, 32, 8)}

    found = {line: of(stage.dense, stage.kind, contender) for contender, line in DENSE}
    found[Line(ALL_FULL, FULL)] = of(stage.dense, stage.kind)
    found[Line("flux_ext, 1/4 of the heads streaming", QUARTER)] = of(stage.mixed, "quarter")
    found[Line("flux_ext, 1/2 of the heads streaming", HALF)] = of(stage.mixed, "half")
    found[Line("flux_ext, all heads streaming", ALL)] = of(stage.streaming, "streaming")
    if stage.kind == "dense":
        for share in ("50%", "25%", "10%"):
            found[Line(f"flux_ext, {share} of the key blocks", BLOCKS)] = of("block-sparse", share)
    return {line: points for line, points in found.items() if points}


def _cuda(rows: Sequence[Row], stage: Stage) -> Figure | None:
    """Time over length, the time of everything at one length, and the rate beside its ceiling."""
    found = _found(rows, stage)
    if not found:
        return None
    title = (
        f"Attention of one layer {stage.what}: 32 query and 8 KV heads of 128, bf16; streaming: sink 128, window 2048"
    )
    figure, axes = figure_of(3, title)
    measured = [n for points in found.values() for n in points]
    length = max(measured, key=lambda n: (measured.count(n), n))
    lines = {x: points for x, points in found.items() if x.color != BLOCKS}
    scale = stage.microseconds
    times = {x: {n: (row.us or 0) / scale for n, row in points.items()} for x, points in lines.items()}
    draw_lines(axes[0], stage.over_length, stage.unit, times)
    bars = {x: (points[length].us or 0) / scale for x, points in found.items() if length in points}
    draw_bars(axes[1], f"time at {tokens(length)} tokens (times as fast as full)", stage.unit, bars, ALL_FULL)
    rates = {x: {n: row.rate or 0 for n, row in points.items()} for x, points in lines.items()}
    limit = next((r.rate for r in rows if r.group == "ceiling" and r.kind == stage.ceiling and r.rate), 0)
    draw_lines(
        axes[2], "rate: streaming does less, at a lower rate", f"{stage.rate} of what is visible", rates, False, limit
    )
    if limit:
        axes[2].axhline(limit, color="black", linewidth=1, linestyle=":")
        axes[2].text(min(measured), limit * 1.01, f"measured {stage.ceiling}", fontsize=8)
    draw_legend(figure, axes[0])
    return figure


def cuda(rows: Sequence[Row]) -> dict[str, Figure]:
    """One layer's attention, over a prompt and in a decode step."""
    return {name: figure for name, stage in STAGES.items() if (figure := _cuda(rows, stage))}


def end_to_end(rows: Sequence[dict[str, str]]) -> dict[str, Figure]:
    """Prefill of whole models by share of sparse layers: time and speed-up over length, and of padded batches."""
    measured = [row for row in rows if row.get("prefill_s")]
    models = list(dict.fromkeys(row["model"] for row in measured))
    if not models:
        return {}
    shares = {
        "sdpa": Line("transformers, SDPA", "#3c3c3c", "--"),
        **{
            f"flux {share}": Line(
                f"flux_ext, {said} of the layers sparse".replace("none of the layers", "no layer"), color
            )
            for (share, said), color in zip(SHARES.items(), (FULL, QUARTER, HALF, ALL), strict=True)
        },
    }
    title = "Prefill of whole models on one GPU, bf16, random weights, routes forced"
    if any(row["batch"] != "1" for row in measured):
        title += f"\n{PADDED}"
    figure, axes = figure_of(3, title, len(models))
    for i, model in enumerate(models):
        left, middle, right = axes[3 * i : 3 * i + 3]

        def points(column: str, model: str = model) -> dict[Line, dict[int, float]]:
            one = [row for row in measured if row["model"] == model and row["batch"] == "1" and row.get(column)]
            return {
                line: at
                for variant, line in shares.items()
                if (at := {int(row["length"]): float(row[column]) for row in one if row["variant"] == variant})
            }

        draw_lines(left, f"{model}: time of one prompt", "seconds", points("prefill_s"))
        draw_lines(middle, f"{model}: times as fast as transformers", "times as fast", points("prefill_x"), log=False)
        batches = [row for row in measured if row["model"] == model and row["batch"] != "1"]
        bars = {shares[row["variant"]]: float(row["prefill_s"]) for row in batches}
        if not bars:
            right.set_axis_off()
            continue
        size = f"{batches[0]['batch']} prompts padded to {tokens(int(batches[0]['length']))}"
        order = {line: bars[line] for line in shares.values() if line in bars}
        draw_bars(right, f"{model}: {size}", "seconds", order, shares["sdpa"].name)
        right.set_yticks(range(len(order)), [line.name.removeprefix("flux_ext, ") for line in order], fontsize=8)
    draw_legend(figure, axes[0])
    return {"prefill": figure}


def cpu(rows: Sequence[dict[str, str]]) -> dict[str, Figure]:
    """Processor time beside torch's attention, at the longest length and the widest heads, with the most threads."""

    def most(column: str, among: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        top = max(int(row[column]) for row in among)
        return [row for row in among if int(row[column]) == top]

    kept = most("kv_len", most("head_dim", most("threads", rows)))
    stages = list(dict.fromkeys((row["stage"], row["dtype"]) for row in kept))
    first = kept[0]
    heads = f"{first['q_heads']} query and {first['kv_heads']} KV heads of {first['head_dim']}"
    length = tokens(int(first["kv_len"]))
    threads = f"{first['threads']} threads" if first["threads"] != "1" else "one thread"
    title = f"Attention on a CPU, {length} tokens, {heads}, {threads}: processor time (times as fast as torch)"
    figure, axes = figure_of(min(len(stages), 2), title, -(-len(stages) // 2))
    figure.set_size_inches(9.2, 0.7 + 1.7 * -(-len(stages) // 2))
    torch_line = Line("torch SDPA, dense", "#8a8a8a")
    for one, (stage, dtype) in zip(axes, stages, strict=False):
        own = {row["pattern"]: row for row in kept if (row["stage"], row["dtype"]) == (stage, dtype)}
        dense = own.get("full") or next(iter(own.values()))
        bars = {torch_line: float(dense["peer_cpu_ms"])}
        for pattern, row in own.items():
            bars[Line(f"flux_ext, {pattern}", FULL if pattern == "full" else ALL)] = float(row["cpu_ms"])
        draw_bars(one, f"{stage}, {dtype}", "ms", bars, torch_line.name)
    for one in axes[len(stages) :]:
        one.set_axis_off()
    return {"time": figure}


def pictures(path: Path) -> dict[str, Figure]:
    """The pictures of one table, by name."""
    if path.name.startswith("cuda"):
        return cuda(read(path))
    if path.stem.endswith("frontier"):
        return {"quality": frontier.picture(frontier.read_table(path))}
    rows = read_table(path)
    if path.name.startswith("end_to_end"):
        return end_to_end(rows)
    return cpu(rows) if path.name.startswith("cpu") else {}


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks picture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for table in args.tables:
        for name, figure in pictures(table).items():
            path = args.output / f"{table.stem}-{name}.png"
            figure.savefig(path, dpi=110)
            print(path)
