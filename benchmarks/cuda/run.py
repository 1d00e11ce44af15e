"""Times of the CUDA operators beside their peers and the machine's ceilings, all measured in one run.

    python -m benchmarks cuda --out results                       # everything, the most important first
    python -m benchmarks cuda --groups decode,router --minutes 3  # some groups, at most so long
    python -m benchmarks cuda --tiny                              # every group in seconds, on a CPU too
    python -m benchmarks cuda --library OLD --library NEW         # two builds, in turns, our times only
    python -m benchmarks cuda --summary results/cuda.csv results/end_to_end-*.csv

Work counts visible pairs only: ``4 * D`` FLOPs per visible (query head, query, key), and for decode the bytes of the
visible keys and values. Every row is on disk before the next case starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import compare, criteria, decode, prefill, selection
from .measure import DeviceLost, Timing, first_line, host_us, race, release
from .problems import OURS, Group, Problem, Setting, Spec
from .table import Ceilings, Row, Table, line, read, rows_of

# Bytes first, then the matrix units, then what combines them.
ORDER = (
    "decode", "decode-streaming", "decode-mixed", "router", "dense", "streaming", "mixed-heads", "mixed-sequences",
    "few-queries", "dense-short", "short", "dense-64", "dense-256", "decode-paged", "block-sparse", "selection",
    "decode-layers", "decode-wide", "append", "host", "backward", "flex",
)  # fmt: skip
GROUPS: dict[str, Group] = {g.name: g for g in (*decode.groups(), *prefill.groups(), *selection.groups())}
UNITS = {decode.build_decode: "TB/s", decode.build_layers: "TB/s"}


def ceilings(setting: Setting) -> tuple[Ceilings, list[Row]]:
    """The two ceilings, as rows of their own: the fastest round of the fastest way, so that no heat flatters us."""
    n, size = (64, 1 << 16) if setting.tiny else (8192, 4 << 30)
    a, b = setting.random(n, n), setting.random(n, n)
    x = torch.randint(1 << 30, (size // 4,), device=setting.device, dtype=torch.int32)
    y = torch.empty_like(x)
    found = Ceilings()
    rows = []
    for kind, problem in (
        ("bf16 matrix product", Problem({"cuBLAS": [lambda: a @ b]}, flops=2.0 * n**3)),
        # In a graph, copy_ is left to the copy engines, which are slower than a kernel.
        ("device copy", Problem({"copy": [lambda: y.copy_(x)], "kernel": [lambda: torch.neg(x, out=y)]},
                                num_bytes=2.0 * size)),
    ):  # fmt: skip
        timings = race(problem.contenders, setting.device, setting.seconds).values()
        timing = min((t for t in timings if t.ok), key=lambda t: t.best)
        timing.us = timing.best
        rate = (problem.flops or problem.num_bytes) / timing.us / 1e6
        setattr(found, "matrix" if problem.flops else "copy", rate)
        spec = Spec("ceiling", kind, 1, n if problem.flops else size, 0, 0, 0)
        rows.append(rows_of(spec, problem, {OURS: timing}, found)[0])
        rows[-1].contender = "PyTorch"
    return found, rows


def run_case(group: Group, spec: Spec, setting: Setting, limits: Ceilings) -> list[Row]:
    """The rows of one case; what goes wrong is in them."""
    problem = Problem()
    try:
        problem = group.build(spec, setting)
        timings = race(problem.contenders, setting.device, setting.seconds)
        for name, call in problem.host.items():
            timings[name] = Timing(host_us(call, setting.device), 0.0, note="host time of one call")
    except DeviceLost:
        raise
    except Exception as error:  # out of memory while building, say
        timings = {OURS: Timing(note=first_line(error))}
    rows = rows_of(spec, problem, timings, limits)
    del problem
    release(setting.device)
    return rows


def run_groups(names: list[str], setting: Setting, table: Table, deadline: float) -> list[str]:
    """Runs groups in order; returns those left when the time was up.

    Shares are of the ceilings before the first group. A second look at them, after the last, shows what heat does.
    """
    limits, rows = ceilings(setting)
    table.add(rows)
    print(f"ceilings: {limits.matrix:.4g} TFLOP/s, {limits.copy:.4g} TB/s", flush=True)
    left = _run_groups(names, setting, table, limits, deadline)
    again, rows = ceilings(setting)
    table.add([replace(row, note="after the last group") for row in rows])
    print(f"ceilings at the end: {again.matrix:.4g} TFLOP/s, {again.copy:.4g} TB/s", flush=True)
    return left


def _run_groups(names: list[str], setting: Setting, table: Table, limits: Ceilings, deadline: float) -> list[str]:
    for i, name in enumerate(names):
        begin, group = time.monotonic(), GROUPS[name]
        for spec in dict.fromkeys(setting.shrink(s) for s in group.specs):
            if time.monotonic() > deadline:
                return names[i:]
            try:
                rows = run_case(group, spec, setting, limits)
            except DeviceLost as error:
                table.add([Row(**vars(spec), contender=OURS, note=f"device lost: {error}")])
                print(f"{spec.label}: device lost: {error}", flush=True)
                _restart(names[i + 1 :], deadline)
            table.add(rows)
            print(line(rows, UNITS.get(group.build, "TFLOP/s")), flush=True)
        print(f"-- {name}: {time.monotonic() - begin:.1f} s", flush=True)
    return []


def _restart(names: list[str], deadline: float) -> None:
    """Goes on with the next group in a new process: the CUDA context of this one is lost."""
    minutes = (deadline - time.monotonic()) / 60
    if not names or minutes <= 0:
        raise SystemExit("the device is lost, nothing is left to run")
    options = [sys.executable, "-m", "benchmarks", "cuda", *sys.argv[1:], "--append"]
    options += ["--groups", ",".join(names), "--minutes", f"{minutes:.2f}"]
    sys.stdout.flush()
    os.execv(sys.executable, options)


def summarize(rows: list[Row], models: list[Path], out: Path | None) -> None:
    """Prints the criteria, and writes them beside the table."""
    seen = criteria.Results(rows, [row for path in models for row in criteria.read_models(path)])
    lines = criteria.verdicts(seen, criteria.everything(GROUPS.values()))
    criteria.show(lines)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        criteria.write(out / "criteria.csv", lines)


def group_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [n for n in names if n not in GROUPS]:
        raise argparse.ArgumentTypeError(f"no group {unknown[0]!r}: choose from {','.join(ORDER)}")
    return names


@torch.inference_mode()
def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks cuda", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for cuda.csv and criteria.csv")
    parser.add_argument("--groups", type=group_names, default=list(ORDER), help=",".join(ORDER))
    parser.add_argument("--minutes", type=float, default=60.0, help="start no case after this")
    parser.add_argument("--tiny", action="store_true", help="small cases, on the CPU where there is no GPU")
    parser.add_argument("--no-peers", action="store_true", help="our times only")
    parser.add_argument("--append", action="store_true", help="add to an existing cuda.csv")
    parser.add_argument("--library", type=Path, action="append", default=[], help="compare two folders of libraries")
    parser.add_argument("--rounds", type=int, default=2, help="processes per library")
    parser.add_argument("--summary", type=Path, nargs="+", help="only check the criteria on these tables")
    args = parser.parse_args(argv)
    if args.summary:
        tables = [p for p in args.summary if p.name.startswith("cuda")]
        models = [p for p in args.summary if p not in tables]
        return summarize([row for path in tables for row in read(path)], models, args.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("no CUDA GPU: only --tiny runs without one")
    if args.library:
        options = ["--groups", ",".join(args.groups), "--minutes", str(args.minutes / args.rounds / len(args.library))]
        return compare.main(args.library, args.rounds, options + ["--tiny"] * args.tiny, args.out)
    torch.manual_seed(0)
    setting = Setting(device, args.tiny, not args.no_peers)
    table = Table(args.out / "cuda.csv" if args.out else None, device, args.append)
    left = run_groups(args.groups, setting, table, time.monotonic() + 60 * args.minutes)
    if left:
        print(f"time is up; not run or not finished: {','.join(left)}")
    if not args.no_peers:
        summarize(table.rows, [], args.out)
