"""Attention on the CPU beside PyTorch's scaled_dot_product_attention on the same threads.

    python -m benchmarks cpu --threads 1 2 --lengths 1024 4096 16384

Ours and the peer take turns; the best of all rounds counts. ``ratio`` is the peer's time over ours by the wall clock,
``cpu_ratio`` by the processor time of all threads, which other programs on the machine disturb less. PyTorch has no
streaming attention: there the peer is dense, and ``share`` is how much of the saved work is saved time
(dense time / streaming time of this package, by processor time, over the ratio of visible pairs).
"""

from __future__ import annotations

import argparse
import csv
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flux_ext
from benchmarks.cases import SPARSE, Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELDS = (
    "threads", "stage", "pattern", "dtype", "head_dim", "kv_len", "q_heads", "kv_heads",
    "ms", "peer_ms", "ratio", "cpu_ms", "peer_cpu_ms", "cpu_ratio", "cpu_gflops", "share",
)  # fmt: skip


def machine() -> dict[str, str]:
    """What a figure depends on."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model or platform.processor(),
        "cores": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": _isa(),
        "commit": commit or "unknown",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _isa() -> str:
    try:
        from flux_ext import _C
    except ImportError:
        return "unknown"
    return str(_C.isa())


def best_of(functions: list[Callable[[], object]], seconds: float) -> list[tuple[float, float]]:
    """Best wall and processor milliseconds of each; they take turns for about ``seconds``, at least 2 rounds."""
    best = [(float("inf"), float("inf"))] * len(functions)
    calls = []
    for f in functions:  # warm up; short calls are timed in groups of about 10 ms
        begin = time.perf_counter()
        f()
        elapsed = time.perf_counter() - begin
        if elapsed < 0.05:
            begin = time.perf_counter()
            f()
            elapsed = time.perf_counter() - begin
        calls.append(max(1, int(0.01 / max(elapsed, 1e-7))))
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - start < seconds:
        for i, f in enumerate(functions):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[i]):
                f()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best[i] = (min(best[i][0], wall / calls[i] * 1e3), min(best[i][1], cpu / calls[i] * 1e3))
        rounds += 1
    return best


def time_case(case: Case, seconds: float) -> list[tuple[float, float]]:
    """(wall, processor) milliseconds: ours, the peer, and for streaming cases ours with the full pattern."""
    q, k, v = case.states()
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]

    def ours(c: Case) -> torch.Tensor:
        return flux_ext.attention(q, k, v, c.route(), sparse=SPARSE)

    def peer() -> torch.Tensor:
        return F.scaled_dot_product_attention(*heads_first, is_causal=case.stage != "decode", enable_gqa=True)

    dense = replace(case, pattern="full")
    if case.stage != "backward":
        with torch.no_grad():
            functions: list[Callable[[], object]] = [lambda: ours(case), peer]
            if case.pattern != "full":
                functions.append(lambda: ours(dense))
            return best_of(functions, seconds)
    for t in (q, k, v):
        t.requires_grad_()
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    outputs = [ours(case), peer().transpose(1, 2)] + ([ours(dense)] if case.pattern != "full" else [])
    grad = torch.randn_like(outputs[0])
    return best_of([lambda o=o: torch.autograd.grad(o, (q, k, v), grad, retain_graph=True) for o in outputs], seconds)


def measure(case: Case, threads: int, seconds: float) -> dict[str, object]:
    """One line of the table."""
    torch.set_num_threads(threads)
    (wall, cpu), (peer_wall, peer_cpu), *dense = time_case(case, seconds)
    work_ratio = replace(case, pattern="full").visible_pairs() / case.visible_pairs()
    return {
        "threads": threads, "stage": case.stage, "pattern": case.pattern,
        "dtype": str(case.dtype).removeprefix("torch."), "head_dim": case.head_dim, "kv_len": case.kv_len,
        "q_heads": case.num_q_heads, "kv_heads": case.num_kv_heads,
        "ms": round(wall, 4), "peer_ms": round(peer_wall, 4), "ratio": round(peer_wall / wall, 2),
        "cpu_ms": round(cpu, 4), "peer_cpu_ms": round(peer_cpu, 4), "cpu_ratio": round(peer_cpu / cpu, 2),
        "cpu_gflops": round(case.flops() / cpu / 1e6, 1),
        "share": round(dense[0][1] / cpu / work_ratio, 2) if dense else "",
    }  # fmt: skip


def cases(args: argparse.Namespace) -> list[Case]:
    return [
        Case(stage, pattern, length, dim, DTYPES[dtype])
        for stage in args.stages
        for dtype in args.dtypes
        for dim in args.head_dims
        for length in args.lengths
        for pattern in ("full", "streaming")
        if pattern == "full" or length >= 8192
        if stage != "backward" or length <= args.max_backward
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks cpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--stages", choices=("prefill", "decode", "backward"), nargs="+", default=["prefill", "decode"])
    parser.add_argument("--max-backward", type=int, default=4096, help="longest sequence of the backward cases")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per case, at least 2 rounds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    info = machine()
    path = args.out / f"cpu-{info['kernels']}-{'-'.join(args.stages)}.csv"
    print(" ".join(f"{k}={v}" for k, v in info.items()))
    print(" ".join(f"{name:>10}" for name in FIELDS))
    runs = [(case, threads) for threads in args.threads for case in cases(args)]
    with path.open("w", newline="") as file:
        for key, value in {**info, "command": shlex.join(["python", "-m", "benchmarks", "cpu", *argv])}.items():
            file.write(f"# {key}: {value}\n")
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for case, threads in tqdm(runs, desc="cpu", unit="case"):
            row = measure(case, threads, args.seconds)
            table.writerow(row)
            file.flush()
            tqdm.write(" ".join(f"{row[name]!s:>10}" for name in FIELDS))
    print(f"wrote {path}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
