"""Rows of results: computed from timings, written as each case ends, read back."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .measure import Timing
from .problems import OURS, Problem, Spec


@dataclass
class Row:
    """One contender of one case."""

    group: str
    kind: str
    batch: int
    length: int
    dim: int
    heads: int
    kv_heads: int
    layout: str
    contender: str
    us: float | None = None
    spread: float | None = None  # distance of the quartiles over the median
    rate: float | None = None  # TFLOP/s or TB/s of visible work
    share: float | None = None  # of the ceiling measured in the same run
    ratio: float | None = None  # this contender's time over that of flux_ext; for flux_ext: the fastest peer's
    note: str = ""

    @property
    def case(self) -> str:
        return Spec(*(getattr(self, f.name) for f in fields(Spec))).label

    @property
    def ours(self) -> bool:
        return self.contender.startswith(OURS)


NUMBERS = {"batch": int, "length": int, "dim": int, "heads": int, "kv_heads": int}
MEASURED = ("us", "spread", "rate", "share", "ratio")


@dataclass
class Ceilings:
    """What the machine gives in this run: TFLOP/s of a large matrix product, TB/s of a copy (read + write)."""

    matrix: float = float("nan")
    copy: float = float("nan")


def rows_of(spec: Spec, problem: Problem, timings: dict[str, Timing], ceilings: Ceilings) -> list[Row]:
    """The table's rows of one case."""
    base = asdict(spec)
    peers = [t.us for name, t in timings.items() if t.ok and not name.startswith(OURS)]
    ours = timings.get(OURS, Timing())
    rows = []
    for name, timing in timings.items():
        row = Row(**base, contender=name, note=timing.note)
        if timing.ok:
            row.us, row.spread = timing.us, timing.spread
            work, ceiling = (problem.flops, ceilings.matrix) if problem.flops else (problem.num_bytes, ceilings.copy)
            # Only contenders that compute the case itself have a rate: no others are named with a comma or 's.
            if work and not any(mark in name for mark in (",", "'s")):
                row.rate = work / timing.us / 1e6
                row.share = row.rate / ceiling
            if name == OURS:
                row.ratio = min(peers) / timing.us if peers else None
            elif ours.ok:
                row.ratio = timing.us / ours.us
        rows.append(row)
    rows += [Row(**base, contender=name, note=why) for name, why in problem.skipped.items()]
    return rows


def line(rows: Sequence[Row], unit: str) -> str:
    """One case in one line."""
    ours = next((r for r in rows if r.contender == OURS), rows[0])
    if ours.us is None:
        return f"{ours.case:44} failed: {ours.note}"
    text = f"{ours.case:44}{ours.us:11.2f} us"
    if ours.rate is not None and ours.share is not None:
        text += f"{ours.rate:8.2f} {unit}{100 * ours.share:5.0f} %"
    for r in rows:
        if r is not ours and r.ratio is not None:
            text += f"  {r.contender.removeprefix(OURS + ', ')} {r.ratio:.2f}x"
        elif r is not ours and r.us is None and "Error" in r.note and "ModuleNotFound" not in r.note:
            text += f"  {r.contender} failed"
    return text + (f"  [{ours.note[:40]}]" if ours.note else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def about(device: str) -> dict[str, str]:
    """What the figures depend on. FLUX_COMMIT names the commit where there is no git."""
    commit = os.environ.get("FLUX_COMMIT") or _output("git", "describe", "--always", "--dirty") or "unknown"
    info = {"torch": torch.__version__, "commit": commit}
    if device == "cuda":
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # a line per GPU
        info = {"gpu": torch.cuda.get_device_name(), "driver": drivers.partition("\n")[0], **info}
    return info


class Table:
    """A CSV file that always holds everything seen so far."""

    def __init__(self, path: Path | None, device: str, append: bool = False) -> None:
        self.rows: list[Row] = []
        self._path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            self.rows = read(path)
            return
        with path.open("w", newline="") as file:
            command = shlex.join(["python", "-m", "benchmarks", "cuda", *sys.argv[1:]])
            for key, value in {**about(device), "command": command}.items():
                file.write(f"# {key}: {value}\n")
            csv.writer(file).writerow([f.name for f in fields(Row)])

    def add(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.rows += rows
        if self._path is None:
            return
        with self._path.open("a", newline="") as file:
            for row in rows:
                values = asdict(row)
                for name in MEASURED:
                    values[name] = "" if values[name] is None else f"{values[name]:.6g}"
                csv.writer(file).writerow(values.values())


def read(path: Path) -> list[Row]:
    """The rows of a CSV that Table wrote."""
    with path.open(newline="") as file:
        found = csv.DictReader(text for text in file if not text.startswith("#"))
        return [
            Row(
                **{
                    name: NUMBERS[name](value)
                    if name in NUMBERS
                    else (float(value) if value else None)
                    if name in MEASURED
                    else value
                    for name, value in record.items()
                }
            )
            for record in found
        ]
