"""Pictures of measured tables: bars of rates beside their ceilings, and what a share of sparse layers gives.

    python -m benchmarks picture benchmarks/results/*.csv --output docs/images

One picture per table of ``benchmarks cuda`` (two: prefill, decode), ``end_to_end``, ``cpu`` and ``frontier``, named
after it; none of other tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cuda.criteria import read_models as read_table
from benchmarks.cuda.problems import OURS
from benchmarks.cuda.table import Row, read
from flux_ext.evaluation import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    OURS: "#1f6fb4", "SDPA cuDNN": "#d98c21", "SDPA flash": "#8a8a8a", "FlexAttention": "#6aa84f",
    "FlashAttention-3": "#b4417a", "FlashAttention-4": "#7b52ab", "FlashInfer": "#3aa6a0",
}  # fmt: skip
PREFILL = ("dense", "streaming", "mixed-heads", "block-sparse", "dense-64", "streaming-64", "mixed-heads-64")
DECODE = ("decode", "decode-streaming", "decode-mixed", "decode-paged", "decode-wide", "decode-layers")

Bars = dict[str, dict[str, float]]  # by case and contender


def tokens(n: int) -> str:
    """131072 as 128K."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def _figure(bars: Bars) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    count = sum(len(found) for found in bars.values())
    figure = Figure(figsize=(8, 1.3 + 0.22 * count + 0.12 * len(bars)), layout="constrained")
    return figure, figure.subplots()


def draw_bars(
    bars: Bars, label: str, line: tuple[float, str] | None = None, digits: int = 0, log: bool = False
) -> Figure:
    """Horizontal bars, grouped by case; ``line``: a value to compare with, and its name."""
    figure, axes = _figure(bars)
    names = list(dict.fromkeys(name for found in bars.values() for name in found))
    y, ticks = 0.0, []
    longest = max([x for found in bars.values() for x in found.values()] + [line[0] if line else 0.0])
    for found in bars.values():
        ticks.append(y + (len(found) - 1) / 2)
        for name, x in found.items():
            axes.barh(y, x, 0.9, color=COLORS.get(name, f"C{names.index(name)}"), label=name)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            axes.text(x * (1.01 if log else 1) + (0 if log else 0.006 * longest), y, f"{x:.{digits}f}", va="center",
                      fontsize=7, bbox=box)  # fmt: skip
            y += 1
        y += 0.6
    if line:
        axes.axvline(line[0], color="black", linewidth=1, linestyle="--", label=line[1])
    axes.set_yticks(ticks, list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlim(0.5 if log else 0, (1.3 if log else 1.1) * longest)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    return figure


def _label(row: Row) -> str:
    name = row.group.removesuffix("-64").removeprefix("decode-").replace("-", " ")
    what = name if row.kind in name or name in ("dense", "decode") else f"{name}, {row.kind}"
    size = f"{row.batch} x {tokens(row.length)}" if row.group in DECODE else tokens(row.length)
    heads = "" if (row.heads, row.kv_heads) == (32, 8) else f", {row.heads}/{row.kv_heads} heads"
    return f"{what}, {size}, D {row.dim}{heads}"


def cuda(rows: Sequence[Row]) -> dict[str, Figure]:
    """Rates on visible work: prefill in TFLOP/s, decode in TB/s, each beside its ceiling."""
    figures = {}
    for name, groups, unit, ceiling in (
        ("prefill", PREFILL, "TFLOP/s of visible work", "bf16 matrix product"),
        ("decode", DECODE, "TB/s of visible keys and values", "device copy"),
    ):
        bars: Bars = {}
        order = sorted(rows, key=lambda r: (groups.index(r.group) if r.group in groups else 0, r.batch, r.length))
        for row in order:
            if row.group in groups and row.rate and "mask" not in row.contender:
                bars.setdefault(_label(row), {})[row.contender] = row.rate
        limit = next((r.rate for r in rows if r.group == "ceiling" and r.kind == ceiling and r.rate), None)
        if bars:
            line = (limit, f"measured {ceiling}") if limit else None
            figures[name] = draw_bars(bars, unit, line, digits=0 if name == "prefill" else 2)
    return figures


def end_to_end(rows: Sequence[dict[str, str]]) -> dict[str, Figure]:
    """Prefill of whole models: speed-up over stock attention by share of sparse layers."""
    bars: Bars = {}
    for row in rows:
        if row.get("prefill_x") and row["variant"] != "sdpa":
            batch = f" x {row['batch']}" if row["batch"] != "1" else ""
            share = row["variant"].removeprefix("flux ")
            case = f"{row['model']}, {tokens(int(row['length']))}{batch}"
            bars.setdefault(case, {})[f"{share} of the layers sparse"] = float(row["prefill_x"])
    line = (1.0, "stock attention")
    return {"prefill": draw_bars(bars, "prefill, times as fast as stock attention", line, 2)} if bars else {}


def cpu(rows: Sequence[dict[str, str]]) -> dict[str, Figure]:
    """Speed beside torch's attention, by processor time, at the largest number of threads."""
    bars: Bars = {}
    most = max(int(row["threads"]) for row in rows)
    for row in rows:
        if int(row["threads"]) == most:
            case = f"{row['stage']}, {row['pattern']} {tokens(int(row['kv_len']))}, D {row['head_dim']}"
            bars.setdefault(case, {})[row["dtype"]] = float(row["cpu_ratio"])
    return {"speed": draw_bars(bars, "times as fast as torch's SDPA (dense)", (1.0, "torch"), 1, log=True)}


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
