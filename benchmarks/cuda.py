"""Times of the CUDA operators beside their peers and the machine's ceilings, all measured in one run.

``python -m benchmarks cuda --out results`` prints a table and writes ``cuda.csv``. Work counts visible pairs
only: ``4 * D`` FLOPs per visible (query head, query, key), and for decode the bytes of the visible keys
and values.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flux_ext import Full, Streaming, ops
from flux_ext.patterns import Pattern
from flux_ext.router import HeadRouter, LayerRouter, Router

HEADS, KV_HEADS = 32, 8
CACHE_BYTES = 160 << 20  # inputs are rotated through more than the L2 holds


@dataclass
class Row:
    """One line of the table."""

    case: str
    what: str
    microseconds: float
    rate: float = 0.0  # TFLOP/s or TB/s of visible work
    share: float = 0.0  # of the ceiling measured in this run


def median_us(run: Callable[[], object], repeats: int = 10, calls: int = 1) -> float:
    """Median time of one call in microseconds; ``run`` makes ``calls`` of them."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def graph_us(functions: Iterable[Callable[[], object]], rounds: int = 4) -> float:
    """Time of one call inside a CUDA graph that rotates through all functions ``rounds`` times."""
    functions = list(functions)
    for run in functions:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in functions:
                run()
    return median_us(graph.replay, calls=rounds * len(functions))


def visible_pairs(pattern: Pattern, q_len: int, kv_len: int) -> int:
    """Pairs that a full or token-exact streaming pattern lets one head see."""
    p = torch.arange(kv_len - q_len, kv_len, dtype=torch.int64)
    sink, window, _, align = pattern.numbers()
    begin = (align * (p // align + 1) - window).clamp(min=0)
    return int((p + 1 - begin + torch.minimum(begin, torch.tensor(sink))).sum())


class Bench:
    """Collects rows; knows the two ceilings."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        us = median_us(lambda: a @ b)
        self.matrix_rate = 2 * 8192**3 / us / 1e6
        self.add("ceiling", "8192^3 bf16 matrix product", us, self.matrix_rate, 1.0)
        x = torch.empty(4 << 30, device="cuda", dtype=torch.uint8).random_()
        y = torch.empty_like(x)
        us = median_us(lambda: y.copy_(x))
        self.copy_rate = 2 * x.numel() / us / 1e6
        self.add("ceiling", "device copy, read + write", us, self.copy_rate, 1.0)

    def add(self, case: str, what: str, us: float, rate: float = 0.0, share: float = 0.0) -> None:
        row = Row(case, what, us, rate, share)
        self.rows.append(row)
        print(f"{case:44} {what:28} {us:12.2f} us {rate:8.2f} {100 * share:6.1f} %", flush=True)

    def compute(self, case: str, what: str, us: float, flops: float) -> None:
        rate = flops / us / 1e6
        self.add(case, what, us, rate, rate / self.matrix_rate)

    def memory(self, case: str, what: str, us: float, num_bytes: float) -> None:
        rate = num_bytes / us / 1e6
        self.add(case, what, us, rate, rate / self.copy_rate)


def states(batch: int, q_len: int, kv_len: int, dim: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    make = lambda n, h: torch.randn(batch, n, h, dim, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return make(q_len, heads), make(kv_len, KV_HEADS), make(kv_len, KV_HEADS)


def attend(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor | None, sparse: Pattern, kv_end: Tensor | None = None
) -> Tensor:
    return ops.attend(q, k, v, route, Full(), sparse, q.shape[-1] ** -0.5, None, None, None, kv_end)[0]


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
        )


def peers(
    bench: Bench, case: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, flops: float, num_bytes: float
) -> None:
    for name, backend in (
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
    ):
        try:
            if causal:
                bench.compute(case, name, median_us(lambda b=backend: sdpa(b, q, k, v, True)), flops)
            else:
                bench.memory(case, name, graph_us([lambda b=backend: sdpa(b, q, k, v, False)]), num_bytes)
        except RuntimeError as error:
            print(f"{case:44} {name:28} not available: {str(error).splitlines()[0][:60]}")


def flex(bench: Bench, case: str, q: Tensor, k: Tensor, v: Tensor, route: Tensor, flops: float) -> None:
    """FlexAttention with the same routes, its block mask built outside the timing and once inside."""
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    compiled_mask = torch.compile(create_block_mask)

    def mask(b, h, i, j):
        near = (j < 128) | (j > i - 2048)
        return (i >= j) & (near | (route[b, h // group] == 0))

    def build():
        return compiled_mask(mask, 1, q.shape[2], n, n, device="cuda")

    block_mask = build()
    run = torch.compile(flex_attention)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    us = median_us(lambda: run(*heads_first, block_mask=block_mask, enable_gqa=True))
    bench.compute(case, "FlexAttention", us, flops)
    bench.compute(case, "FlexAttention + block mask", us + median_us(build), flops)


def prefill(bench: Bench, lengths: Iterable[int]) -> None:
    """Dense, streaming and mixed heads on one long prompt."""
    sparse = Streaming(128, 2048)
    for dim in (128, 64):
        for n in lengths:
            if dim == 64 and n > 32768:
                continue
            q, k, v = states(1, n, n, dim)
            per_head = {
                0: 4.0 * dim * visible_pairs(Full(), n, n),
                1: 4.0 * dim * visible_pairs(sparse, n, n),
            }
            for name, share in (("dense", 0), ("half the heads streaming", 4), ("streaming", 8)):
                route = torch.tensor([[1] * share + [0] * (KV_HEADS - share)], dtype=torch.int32, device="cuda")
                flops = HEADS / KV_HEADS * sum(per_head[int(r)] for r in route[0])
                case = f"prefill {n} d{dim} {name}"
                bench.compute(case, "flux_ext", median_us(lambda s=(q, k, v), r=route: attend(*s, r, sparse)), flops)
                if name == "dense":
                    peers(bench, case, q, k, v, True, flops, 0)
                elif share == 4 and (dim, n) == (128, 32768):
                    flex(bench, case, q, k, v, route, flops)


def decode(bench: Bench, sizes: Iterable[tuple[int, int]]) -> None:
    """One query token per sequence."""
    dim, sparse = 128, Streaming(128, 2048)
    for batch, n in sizes:
        num_bytes = batch * KV_HEADS * n * dim * 4
        sets = [states(batch, 1, n, dim) for _ in range(max(1, min(8, CACHE_BYTES // num_bytes)))]
        for name, share in (("full", 0), ("half the heads streaming", 4), ("streaming", 8)):
            route = torch.tensor([[1] * share + [0] * (KV_HEADS - share)] * batch, dtype=torch.int32, device="cuda")
            seen = num_bytes * (KV_HEADS - share + share * min(1.0, 2176 / n)) / KV_HEADS
            case = f"decode {batch} x {n} {name}"
            us = graph_us([lambda s=s, r=route: attend(*s, r, sparse) for s in sets])
            bench.memory(case, "flux_ext", us, seen)
            if name == "full":
                peers(bench, case, *sets[0], False, 0, num_bytes)


def eager_route(module: Router, x: Tensor) -> Tensor:
    """Pool, MLPs and decision by PyTorch, one sequence length for all."""
    rows = torch.cat([x[:, :100], x[:, -100:]], 1).float().mean(1)
    pooled = (rows if module.per_head else rows.mean(1)).to(torch.bfloat16)
    return module.classifier(module.encoder(pooled)).argmax(-1)


def route(bench: Bench) -> None:
    """The fused router beside the same layers in eager PyTorch."""
    for router, heads in ((LayerRouter, HEADS), (HeadRouter, KV_HEADS)):
        for batch, n in ((1, 512), (1, 131072), (8, 4096), (128, 512)):
            module = router(128).to("cuda", torch.bfloat16)
            x = torch.randn(batch, n, heads, 128, device="cuda", dtype=torch.bfloat16)
            weights = [w.detach() for w in module.weights()]
            case = f"{router.__name__} {batch} x {n}"
            us = graph_us([lambda x=x, w=weights, m=module: ops.route(x, w, 100, m.per_head)], 20)
            bench.add(case, "flux_ext", us)
            us = graph_us([lambda x=x, m=module: eager_route(m, x)], 20)
            bench.add(case, "PyTorch, in a graph", us)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks cuda", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for cuda.csv")
    parser.add_argument("--quick", action="store_true", help="short lengths only")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU")
    torch.manual_seed(0)
    bench = Bench()
    route(bench)
    decode(
        bench,
        [(1, 8192), (1, 131072), (8, 32768)] + ([] if args.quick else [(1, 32768), (64, 8192), (1, 1 << 20)]),
    )
    prefill(bench, [8192, 32768] if args.quick else [4096, 8192, 32768, 131072])
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "cuda.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(bench.rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in bench.rows)


if __name__ == "__main__":
    main()
