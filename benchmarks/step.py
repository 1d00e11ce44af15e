"""Kernels of one decode step of a layer, with the gaps before them.

    python -m benchmarks step --output results     # Llama-3.1-8B's layer after 128K tokens, full and sparse

The times are those of torch.profiler, of replays of a CUDA graph and of eager calls, where the host sets the pace (on a
CPU: of torch operators).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import flux_ext
from benchmarks.end_to_end import SHAPES, STEPS, build, graphed
from flux_ext import FluxStaticCache

LONGEST = 15  # are printed; the table has all
Line = tuple[str, float, float]  # name, us, gap before it


def timeline(run: Callable[[], object], steps: int, kind: str) -> list[list[Line]]:
    """What runs in each of ``steps`` calls: events of a kind ("kernel", "cpu_op") by name, time and gap."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = (kind, "gpu_memcpy", "gpu_memset") if kind == "kernel" else (kind,)
    events = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: (e["ts"], -e["dur"]))
    lines: list[Line] = []
    end = None
    for event in events:
        if kind == "cpu_op" and end is not None and event["ts"] < end:
            continue  # called by the operator before it, and counted with it
        lines.append((event["name"], event["dur"], 0.0 if end is None else event["ts"] - end))
        end = max(end or 0.0, event["ts"] + event["dur"])
    each, rest = divmod(len(lines), steps)
    if rest:
        raise RuntimeError(f"{len(lines)} kernels and copies cannot be those of {steps} equal steps")
    return [lines[i * each : (i + 1) * each] for i in range(steps)]


def medians(steps: list[list[Line]]) -> list[Line]:
    """One line per event of a step; the first step is left out where there are others."""
    steps = steps[1:] or steps
    return [
        (event[0][0], statistics.median(e[1] for e in event), statistics.median(e[2] for e in event))
        for event in zip(*steps, strict=True)
    ]


@torch.no_grad()
def layer_step(name: str, length: int, route: int, steps: int, device: str) -> dict[str, list[Line]]:
    """One layer of a model's shape, after a prompt of ``length`` tokens; ``"graph"`` and ``"eager"``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = {**SHAPES[name][1], "num_hidden_layers": 1, "vocab_size": 1024}
    model = build(name, device, dtype, length, shape)
    ids = torch.randint(0, 1024, (1, length), device=device)
    config = flux_ext.FluxConfig(sink=128, window=2048)
    kind = "kernel" if device == "cuda" else "cpu_op"
    with flux_ext.patched(model, config), flux_ext.routes(model, torch.tensor([route], dtype=torch.int32)):
        cache = FluxStaticCache(model.config, flux_ext.get_routers(model).config, length + STEPS)
        model(ids, past_key_values=cache, logits_to_keep=1)
        position = torch.full((1, 1), length, device=device)

        def step() -> None:
            model(ids[:, :1], past_key_values=cache, position_ids=position)

        step()
        eager = medians(timeline(step, steps, kind))
        return {"graph": medians(timeline(graphed(step, device), steps, kind)), "eager": eager}


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not 1 <= 2 * args.steps + 4 <= STEPS:
        parser.error(f"--steps must be 1 to {STEPS // 2 - 2}, got {args.steps}")
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / f"step-{args.model}-{device}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["route", "how", "kernel", "us", "gap_before_us"])
        for route in (0, 1):
            found = layer_step(args.model, args.length, route, args.steps, device)
            kind = ("full", "sparse")[route]
            for how, lines in found.items():
                writer.writerows([kind, how, name, f"{us:.2f}", f"{gap:.2f}"] for name, us, gap in lines)
                print(f"{kind}, {how}: {len(lines)} kernels, {sum(us for _, us, _ in lines):.1f} us busy, "
                      f"{sum(gap for _, _, gap in lines[1:]):.1f} us between them")  # fmt: skip
            for name, us, gap in sorted(found["graph"], key=lambda line: -line[1] - max(line[2], 0))[:LONGEST]:
                print(f"  {us:8.2f} us after {gap:6.2f}  {name[:80]}")
