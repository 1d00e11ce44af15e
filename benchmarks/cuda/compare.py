"""Two builds of the libraries beside each other: processes in turns, the best of their rounds counts."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flux_ext._library import LIBRARY_VARIABLE

from .table import read

Times = dict[tuple[str, str], float]  # best microseconds by case and contender


def run(library: Path, options: list[str]) -> Times:
    """Our times with one folder of libraries, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "cuda", "--no-peers", "--out", folder, *options]
        environment = {**os.environ, LIBRARY_VARIABLE: str(library.resolve())}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:  # what was timed before it failed counts
            print(f"{library}: exit status {done.returncode}\n{done.stdout[-1500:]}", flush=True)
        table = Path(folder) / "cuda.csv"
        rows = read(table) if table.exists() else []
        return {(row.case, row.contender): row.us for row in rows if row.us is not None}


def main(libraries: list[Path], rounds: int, options: list[str], out: Path | None) -> None:
    """Prints the times of each library and the ratio of every later one to the first; writes ``compare.csv``."""
    best: list[Times] = [{} for _ in libraries]
    for _ in range(rounds):
        for library, times in zip(libraries, best, strict=True):
            for key, us in run(library, options).items():
                times[key] = min(us, times.get(key, us))
    names = [str(library) for library in libraries]
    lines = []
    for key, first in best[0].items():
        found = [times.get(key) for times in best]
        lines.append([*key, *("" if us is None else f"{us:.2f}" for us in found),
                      *("" if us is None else f"{us / first:.3f}" for us in found[1:])])  # fmt: skip
    print(f"{'us of ' + ', '.join(names) + '; then ratios to the first':}")
    for case, contender, *numbers in lines:
        print(f"{case:44} {contender[:24]:24}" + "".join(f"{n:>11}" for n in numbers))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "compare.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "contender", *names, *(f"{name} / {names[0]}" for name in names[1:])])
            writer.writerows(lines)
    if not all(best):
        raise SystemExit("not every library gave times")
